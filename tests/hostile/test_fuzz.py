"""Sound files with bytes flipped, inserted or cut off: an error of ours, or a sound answer.

Nothing but a SourceError may come out, no reader may hang, and none may take more memory than a
small multiple of the file, whatever lengths a broken header claims.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from struct import pack
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.broken import legacy, legacy_entry

from quantcli.errors import SourceError
from quantcli.sources.gguf import open_gguf
from quantcli.sources.imatrix import read_importance
from quantcli.sources.safetensors import read_header

MEMORY = 4 << 20
"""More than any of these files of a few hundred bytes can need, GGUF's first buffer included."""

Edit = tuple[str, float, int]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "remove", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=6,
)
ROUNDS = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@cache
def safetensors_bytes() -> bytes:
    tensors = {
        "model.embed.weight": np.ones((4, 8), np.float32),
        "model.norm.weight": np.ones(8, np.float16),
        "empty": np.ones((0, 3), np.int32),
    }
    return safetensors.numpy.save(tensors, {"format": "pt"})


@cache
def gguf_bytes() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ü"])
        writer.add_array("tokenizer.ggml.scores", [1.0, 2.0, 3.0])
        writer.add_bool("flag", True)
        writer.add_uint32("general.alignment", 32)
        writer.add_tensor("token_embd.weight", np.ones((3, 8), np.float32))
        writer.add_tensor("output_norm.weight", np.ones(8, np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


@cache
def imatrix_bytes() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "i.gguf"
        writer = gguf.GGUFWriter(path, "none")
        writer.add_array("imatrix.datasets", ["wiki"])
        writer.add_uint32("imatrix.chunk_count", 3)
        writer.add_uint32("imatrix.chunk_size", 512)
        writer.add_tensor("a.weight.in_sum2", np.ones((2, 4), np.float32))
        writer.add_tensor("a.weight.counts", np.ones((2, 1), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


@cache
def legacy_bytes() -> bytes:
    entries = (legacy_entry(b"a.weight", [1.0, 2.0]), legacy_entry(b"b.weight", [3.0] * 5, 2))
    return legacy(*entries, tail=pack("<ii", 3, 4) + b"wiki")


def edit(content: bytes, edits: list[Edit]) -> bytes:
    data = bytearray(content)
    for kind, where, value in edits:
        place = int(where * len(data))
        if kind == "cut":
            # Short cuts are the ones that headers survive.
            del data[len(data) - min(len(data), value) :]
        elif kind == "insert" or not data:
            data.insert(place, value)
        elif kind == "remove":
            del data[place]
        elif kind == "flip":
            data[place] ^= 1 << value % 8
        else:
            data[place] = value
    return bytes(data)


def attempt(path: Path, content: bytes, read: Callable[[Path], object]) -> bool:
    """Whether the file is accepted; anything but a SourceError, or much memory, is a failure."""
    path.write_bytes(content)
    refusal: str | None = None
    tracemalloc.start()
    try:
        read(path)
    except SourceError as error:
        refusal = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MEMORY
    assert refusal is None or str(path) in refusal
    return refusal is None


def read_all(path: Path) -> None:
    """Open a GGUF and read every row of every tensor."""
    store = open_gguf(path)
    try:
        for name, info in store.tensors.items():
            rows = info.elements // info.shape[-1] if info.shape else 1
            store.read_rows(name, 0, rows)
    finally:
        store.close()


@ROUNDS
@given(edits=EDITS)
def test_safetensors(tmp_path: Path, edits: list[Edit]) -> None:
    """What the safetensors library refuses is refused; what is accepted it reads alike."""
    content = edit(safetensors_bytes(), edits)
    path = tmp_path / "model.safetensors"
    accepted = attempt(path, content, read_header)
    try:
        theirs = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError:
        assert not accepted
        return
    if accepted:
        ours = read_header(path).tensors
        assert {n: (i.shape, i.dtype, i.nbytes) for n, i in ours.items()} == {
            n: (tuple(t["shape"]), t["dtype"], len(t["data"])) for n, t in theirs.items()
        }


@ROUNDS
@given(edits=EDITS)
def test_gguf(tmp_path: Path, edits: list[Edit]) -> None:
    attempt(tmp_path / "m.gguf", edit(gguf_bytes(), edits), read_all)


@ROUNDS
@given(edits=EDITS)
def test_importance(tmp_path: Path, edits: list[Edit]) -> None:
    attempt(tmp_path / "i.gguf", edit(imatrix_bytes(), edits), read_importance)


@ROUNDS
@given(edits=EDITS)
def test_legacy_importance(tmp_path: Path, edits: list[Edit]) -> None:
    attempt(tmp_path / "i.dat", edit(legacy_bytes(), edits), read_importance)


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (safetensors_bytes, read_header),
        (gguf_bytes, read_all),
        (legacy_bytes, read_importance),
    ],
)
def test_every_truncation(
    tmp_path: Path, content: Callable[[], bytes], read: Callable[[Path], object]
) -> None:
    """No proper beginning of a file is taken for the whole, but for a legacy one without tail."""
    whole = content()
    accepted = [n for n in range(len(whole)) if attempt(tmp_path / "f", whole[:n], read)]
    tail, count = len(pack("<ii", 3, 4) + b"wiki"), len(pack("<i", 3))
    without_tail = len(whole) - tail
    padding = range(len(gguf_bytes().rstrip(b"\0")), len(gguf_bytes()))
    allowed = {
        safetensors_bytes: set(),
        gguf_bytes: set(padding),
        legacy_bytes: {without_tail, without_tail + count},
    }
    assert set(accepted) <= allowed[content]
