"""Sound files cut off anywhere: a SourceError, and little memory.

No reader takes more than a small multiple of the file, whatever lengths a header claims.
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
from support.broken import legacy, legacy_entry

from quantcli.errors import SourceError
from quantcli.sources.gguf import open_gguf
from quantcli.sources.imatrix import read_importance
from quantcli.sources.safetensors import read_header

MEMORY = 4 << 20
"""More than any of these files of a few hundred bytes can need, GGUF's first buffer included."""


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
def legacy_bytes() -> bytes:
    entries = (legacy_entry(b"a.weight", [1.0, 2.0]), legacy_entry(b"b.weight", [3.0] * 5, 2))
    return legacy(*entries, tail=pack("<ii", 3, 4) + b"wiki")


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
