"""An importance matrix broken in one named way, in either form: its own sentence and entry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
from support.broken import Gguf, legacy, legacy_entry

from quantcli.errors import SourceError
from quantcli.sources.imatrix import read_importance

NAME = "blk.0.attn_q.weight"


class Case(NamedTuple):
    build: Callable[[Path], object]
    sentence: str
    entry: str | None = None


def write_gguf(
    path: Path,
    tensors: dict[str, Any],
    *,
    drop: str = "",
    chunks: Any = 3,
    datasets: Any = ("x",),
    enough: str = "",
) -> None:
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    facts = {
        "imatrix.datasets": lambda: writer.add_array("imatrix.datasets", list(datasets)),
        "imatrix.chunk_count": lambda: (
            writer.add_uint32("imatrix.chunk_count", chunks)
            if isinstance(chunks, int)
            else writer.add_string("imatrix.chunk_count", chunks)
        ),
        "imatrix.chunk_size": lambda: writer.add_uint32("imatrix.chunk_size", 512),
    }
    for key, write in facts.items():
        if key != drop:
            write()
    if enough:
        writer.add_string("quantcli.imatrix.enough_tokens", enough)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def data(sums: Any = (1.0, 2.0), counts: Any = (1.0,), dtype: Any = np.float32) -> dict[str, Any]:
    return {
        f"{NAME}.in_sum2": np.asarray(sums, dtype).reshape(1, -1),
        f"{NAME}.counts": np.asarray(counts, np.float32).reshape(-1, 1),
    }


def new(tensors: dict[str, Any], **facts: Any) -> Callable[[Path], object]:
    return lambda path: write_gguf(path, tensors, **facts)


def old(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


ENTRY = legacy_entry(NAME.encode(), [1.0, 2.0])
TAIL = pack("<ii", 7, 4) + b"wiki"
LONG_NAME = pack("<i", 1025) + b"n" * 1025

CASES: dict[str, Case] = {
    "counts missing": Case(
        new({f"{NAME}.in_sum2": np.ones((1, 2), np.float32)}), f"but no {NAME}.counts", NAME
    ),
    "sums missing": Case(
        new({f"{NAME}.counts": np.ones((1, 1), np.float32)}), f"but no {NAME}.in_sum2", NAME
    ),
    "sums in F16": Case(
        new(data(dtype=np.float16)), "has .in_sum2 in F16; F32 belongs there", NAME
    ),
    "sum is not a number": Case(
        new(data([1.0, np.nan])), "has the value nan at index 1; mean squares", NAME
    ),
    "sum is infinite": Case(new(data([np.inf, 0.0])), "has the value inf at index 0", NAME),
    "sum is negative": Case(new(data([1.0, -0.5])), "has the value -0.5 at index 1", NAME),
    "count is not a number": Case(
        new(data(counts=[np.nan])), "has the value nan at index 0", f"{NAME}.counts"
    ),
    "count is negative": Case(
        new(data(counts=[-1.0])), "has the value -1.0 at index 0", f"{NAME}.counts"
    ),
    "counts that do not divide": Case(
        new(data([1.0, 2.0, 3.0], [1.0, 1.0])), "has 3 values for 2 counts", NAME
    ),
    "no data sets": Case(new(data(), drop="imatrix.datasets"), "no key 'imatrix.datasets'"),
    "no chunk count": Case(new(data(), drop="imatrix.chunk_count"), "no key 'imatrix.chunk_count'"),
    "no chunk size": Case(new(data(), drop="imatrix.chunk_size"), "no key 'imatrix.chunk_size'"),
    "chunk count is text": Case(
        new(data(), chunks="three"), "key 'imatrix.chunk_count' is of kind str; u32 belongs there"
    ),
    "data sets are numbers": Case(
        new(data(), datasets=[1, 2]), "key 'imatrix.datasets' is of kind [i32]; [str] belongs there"
    ),
    "a model": Case(lambda path: Gguf().write(path), "is a GGUF file without importance data"),
    "a broken GGUF": Case(lambda path: Gguf(cut=40).write(path), "ends inside key 0"),
    "empty": Case(old(b""), "neither in the GGUF nor in the legacy form"),
    "text": Case(old(b"the quick brown fox jumps over the lazy dog"), "neither in the GGUF nor"),
    "a Git LFS pointer": Case(
        old(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"
    ),
    "no entries": Case(old(legacy(count=0, tail=bytes(64))), "neither in the GGUF nor"),
    "negative entries": Case(old(legacy(ENTRY, count=-1)), "neither in the GGUF nor"),
    "more entries than bytes": Case(old(legacy(ENTRY, count=10**9)), "neither in the GGUF nor"),
    "a name of 1025 bytes": Case(old(legacy(LONG_NAME)), "neither in the GGUF nor"),
    "entries missing": Case(
        old(legacy(ENTRY, count=2)), "ends inside the name's length of entry 2 of 2: 4 bytes"
    ),
    "name cut": Case(old(legacy(ENTRY)[:12]), "neither in the GGUF nor"),
    "name cut in the second": Case(
        old(legacy(ENTRY, ENTRY)[: 4 + len(ENTRY) + 9]), "ends inside the name of entry 2 of 2"
    ),
    "negative name": Case(
        old(legacy(ENTRY, pack("<i", -5) + bytes(40))), "ends inside the name of entry 2 of 2: -5"
    ),
    "name not UTF-8": Case(
        old(legacy(ENTRY, legacy_entry(b"\xff\xfe", [1.0]))),
        "the name of entry 2 of 2 is not UTF-8",
    ),
    "calls cut": Case(
        old(legacy(ENTRY)[: 8 + len(NAME) + 2]), f"ends inside the number of calls of {NAME!r}"
    ),
    "no values": Case(old(legacy(legacy_entry(NAME.encode(), []))), "has 0 values", NAME),
    "negative number of values": Case(
        old(legacy(legacy_entry(NAME.encode(), [1.0], count=-3))), "has -3 values", NAME
    ),
    "values cut": Case(old(legacy(ENTRY)[:-1]), f"ends inside the values of {NAME!r}: 8 bytes"),
    "more values than bytes": Case(
        old(legacy(legacy_entry(NAME.encode(), [1.0], count=2**31 - 1))),
        f"ends inside the values of {NAME!r}: 8589934588 bytes",
    ),
    "tokens that are enough as text": Case(
        new(data(), enough="many"),
        "key 'quantcli.imatrix.enough_tokens' is of kind str; u32 belongs there",
    ),
    "value is not a number": Case(
        old(legacy(legacy_entry(NAME.encode(), [0.0, np.nan]))), "the value nan at index 1", NAME
    ),
    "value is a signalling NaN": Case(
        old(legacy(legacy_entry(NAME.encode(), [0.0, 1.0], 3)[:-4] + pack("<I", 0x7FA00000))),
        "the value nan at index 1",
        NAME,
    ),
    "value is infinite": Case(
        old(legacy(legacy_entry(NAME.encode(), [np.inf]))), "the value inf at index 0", NAME
    ),
    "value is negative": Case(
        old(legacy(legacy_entry(NAME.encode(), [-1.0], calls=2))), "value -0.5 at index 0", NAME
    ),
    "entry twice": Case(old(legacy(ENTRY, ENTRY)), "occurs twice", NAME),
    "chunk count cut": Case(
        old(legacy(ENTRY, tail=b"\x07\x00")), "ends inside the number of chunks: 4 bytes"
    ),
    "data set's length cut": Case(
        old(legacy(ENTRY, tail=TAIL[:6])), "ends inside the data set's length"
    ),
    "data set cut": Case(old(legacy(ENTRY, tail=TAIL[:-1])), "ends inside the data set's name"),
    "negative data set": Case(
        old(legacy(ENTRY, tail=pack("<ii", 7, -1))), "ends inside the data set's name: -1 bytes"
    ),
    "trailing bytes": Case(old(legacy(ENTRY, tail=TAIL + b"!")), "1 trailing bytes"),
}


@pytest.mark.parametrize("name", CASES)
def test_sentence(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / "model.imatrix"
    case.build(path)
    with pytest.raises(SourceError) as caught:
        read_importance(path)
    said = str(caught.value)
    assert case.sentence in said
    assert str(path) in said
    assert case.entry is None or f"entry {case.entry!r}" in said
    assert "\n" not in said


@pytest.mark.parametrize("build", [new(data()), old(legacy(ENTRY)), old(legacy(ENTRY, tail=TAIL))])
def test_sound_files_are_read(build: Callable[[Path], object], tmp_path: Path) -> None:
    build(tmp_path / "i")
    assert read_importance(tmp_path / "i").entries[NAME].tolist() == [[1.0, 2.0]]


def test_another_models_length(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(legacy(ENTRY))
    importance = read_importance(tmp_path / "i")
    with pytest.raises(
        SourceError, match=r"entry 'blk.0.attn_q.weight' has 2 values.* 8 \(2 x 4\)"
    ):
        importance.weights(NAME, 2, 4)
