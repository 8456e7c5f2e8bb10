"""A GGUF file broken in one named way: its own sentence, with the file and the key or tensor.

llama.cpp refuses them too, but for a few promises of the format that it does not check.
"""

from __future__ import annotations

from pathlib import Path
from struct import pack
from typing import NamedTuple

import gguf
import numpy as np
import pytest
from support import ggml_reader
from support.broken import Gguf, Line, array, pair, string

from quantcli.errors import SourceError
from quantcli.sources.gguf import open_gguf, read_gguf, shard_name

SOUND = Gguf()
ARCH = SOUND.pairs[0]


class Case(NamedTuple):
    file: Gguf
    sentence: str
    llama_refuses: bool = True


def keys(*pairs: bytes) -> Gguf:
    return SOUND.with_(pairs=(ARCH, *pairs))


def tensor(**changes: object) -> Gguf:
    return SOUND.with_(lines=(Line(**changes),))  # type: ignore[arg-type]


def two(first: int, second: int) -> Gguf:
    """Two tensors of 32 bytes at these offsets."""
    lines = (Line("a", offset=first), Line("b", offset=second))
    return SOUND.with_(lines=lines, data=bytes(160))


ALIGN = "general.alignment"

CASES: dict[str, Case] = {
    "empty": Case(SOUND.with_(cut=0), "begins with b'', not with b'GGUF'"),
    "wrong magic": Case(SOUND.with_(magic=b"GGJT"), "begins with b'GGJT'"),
    "only magic": Case(SOUND.with_(cut=4), "ends inside the version"),
    "version 1": Case(SOUND.with_(version=pack("<I", 1)), "is GGUF version 1; versions 2 and 3"),
    "version 0": Case(SOUND.with_(version=pack("<I", 0)), "is GGUF version 0"),
    "version of the future": Case(SOUND.with_(version=pack("<I", 4)), "is GGUF version 4"),
    "big-endian": Case(SOUND.with_(version=pack(">I", 3)), "is a big-endian GGUF file"),
    "cut in the counts": Case(SOUND.with_(cut=12), "ends inside the number of tensors"),
    "more tensors than bytes": Case(
        SOUND.with_(tensor_count=2**60), "declares 1152921504606846976 tensors"
    ),
    "more keys than bytes": Case(SOUND.with_(pair_count=2**60), "1152921504606846976 key-values"),
    "cut in a key": Case(SOUND.with_(cut=40), "ends inside key 0"),
    "cut in a value": Case(SOUND.with_(cut=60), "the value of key 'general.architecture'"),
    "empty key": Case(keys(pair("", 4, bytes(4))), "key 1 is 0 bytes long"),
    "key too long": Case(
        keys(pair("k" * 70_000, 4, bytes(4))), "key 1 is 70000 bytes long", llama_refuses=False
    ),
    "key longer than the file": Case(
        keys(string(b"k", length=2**40)), "ends inside key 1: 1099511627776 bytes"
    ),
    "key not UTF-8": Case(
        keys(pair(b"k\xff", 4, bytes(4))), "key 1 is not UTF-8: b'k\\xff'", llama_refuses=False
    ),
    "key twice": Case(keys(ARCH), "key 'general.architecture' occurs twice"),
    "unknown value type": Case(
        keys(pair("k", 13, bytes(4))), "key 'k' has the unknown value type 13"
    ),
    "unknown type in an array": Case(
        keys(pair("k", 9, array(77, 1, bytes(4)))), "key 'k' has the unknown value type 77"
    ),
    "array of arrays": Case(
        keys(pair("k", 9, array(9, 1, array(4, 1, bytes(4))))), "key 'k' is an array of arrays"
    ),
    "array longer than the file": Case(
        keys(pair("k", 9, array(4, 2**61, b""))), "values in key 'k', more than"
    ),
    "more strings than bytes": Case(
        keys(pair("k", 9, array(8, 2**40, b""))), "strings in key 'k', more than"
    ),
    "string in an array beyond the file": Case(
        keys(pair("k", 9, array(8, 1, string(b"x", length=2**50)))), "the value of key 'k'"
    ),
    "truth value of two": Case(
        keys(pair("k", 7, b"\x02")), "key 'k' holds the truth value 2", llama_refuses=False
    ),
    "truth value of two in an array": Case(
        keys(pair("k", 9, array(7, 3, b"\x01\x00\x03"))),
        "key 'k' holds the truth value 3",
        llama_refuses=False,
    ),
    "alignment of zero": Case(keys(pair(ALIGN, 4, pack("<I", 0))), f"{ALIGN} is 0 (u32)"),
    "alignment of 48": Case(keys(pair(ALIGN, 4, pack("<I", 48))), f"{ALIGN} is 48 (u32)"),
    "alignment as text": Case(keys(pair(ALIGN, 8, string(b"32"))), f"{ALIGN} is '32' (str)"),
    "alignment as u64": Case(keys(pair(ALIGN, 10, pack("<Q", 32))), f"{ALIGN} is 32 (u64)"),
    "tensor name too long": Case(tensor(name="n" * 64), "the name of tensor 0 is 64 bytes long"),
    "tensor name not UTF-8": Case(
        tensor(name=b"\xfe"), "the name of tensor 0 is not UTF-8", llama_refuses=False
    ),
    "five dimensions": Case(tensor(dims=(1, 1, 1, 1, 1)), "tensor 'w' has 5 dimensions"),
    "dimension of zero": Case(
        tensor(dims=(4, 0)), "tensor 'w' has a dimension of length 0", llama_refuses=False
    ),
    "weights beyond counting": Case(
        tensor(dims=(2**32, 2**31)), "tensor 'w' has dimensions [4294967296, 2147483648]"
    ),
    "removed type": Case(tensor(type_id=4), "tensor 'w' has ggml type 4 (Q4_2)"),
    "removed type of repacking": Case(tensor(type_id=33), "ggml type 33 (Q4_0_8_8)"),
    "unknown type": Case(tensor(type_id=139), "tensor 'w' has the unknown ggml type 139"),
    "row of half a block": Case(
        tensor(dims=(48, 2), type_id=8), "tensor 'w' has rows of 48 weights, not a multiple of Q8_0"
    ),
    "tensor twice": Case(
        SOUND.with_(lines=(Line(), Line(offset=32)), data=bytes(64)), "tensor 'w' is listed twice"
    ),
    "cut in the tensor table": Case(
        SOUND.with_(cut=len(SOUND.head()) - 3), "ends inside the description of tensor 'w'"
    ),
    "misaligned": Case(two(0, 40), "tensor 'b' begins at offset 40, not a multiple of"),
    "overlap": Case(two(0, 0), "tensor 'b' begins at offset 0 and overlaps the tensor before it"),
    "gap": Case(two(0, 64), "tensor 'b' begins at offset 64, leaving a gap after 32"),
    "gap at the start": Case(two(32, 64), "tensor 'a' begins at offset 32, leaving a gap after 0"),
    "offset beyond all files": Case(
        two(0, 2**63), "tensor 'b' begins at offset 9223372036854775808"
    ),
    "data cut": Case(
        SOUND.with_(data=bytes(31)), "tensor 'w' ends 1 bytes beyond the end", llama_refuses=False
    ),
    "no data": Case(SOUND.with_(cut=len(SOUND.head())), "tensor 'w' ends"),
}


@pytest.mark.parametrize("name", CASES)
def test_sentence(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = case.file.write(tmp_path / "m.gguf")
    with pytest.raises(SourceError) as caught:
        read_gguf(path)
    assert case.sentence in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_llama_agrees(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = case.file.write(tmp_path / "m.gguf")
    assert ggml_reader.accepts(path) is not case.llama_refuses


def test_sound_file_is_read(tmp_path: Path) -> None:
    path = SOUND.write(tmp_path / "m.gguf")
    assert ggml_reader.accepts(path)
    assert read_gguf(path).tensors["w"].shape == (2, 4)


@pytest.mark.parametrize("cut", range(0, len(SOUND.head()) + 63, 3))
def test_every_truncation_is_refused(cut: int, tmp_path: Path) -> None:
    whole = SOUND.write(tmp_path / "m.gguf").stat().st_size
    if cut < whole:
        with pytest.raises(SourceError):
            read_gguf(SOUND.with_(cut=cut).write(tmp_path / "cut.gguf"))


# ---- a model in several files


def write_split(folder: Path, count: int = 3) -> list[Path]:
    """A model of ``count`` tensors, one a shard, as llama.cpp's tools write it."""
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=1)
    for number in range(count):
        writer.add_tensor(f"t{number}", np.full((2, 4), number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [folder / shard_name("m", number, count) for number in range(count)]


def test_split_opens_as_one_from_any_shard(tmp_path: Path) -> None:
    for shard in write_split(tmp_path):
        store = open_gguf(shard)
        assert list(store.tensors) == ["t0", "t1", "t2"]
        assert store.read_rows("t2", 1, 2).tolist() == [[2.0] * 4]
        assert store.path.name == "m-00001-of-00003.gguf"
        assert not any(key.startswith("split.") for key in store.metadata)
        store.close()


def test_split_shard_missing(tmp_path: Path) -> None:
    shards = write_split(tmp_path)
    shards[1].unlink()
    with pytest.raises(SourceError, match=r"m-00002-of-00003.gguf: this shard .* is missing"):
        open_gguf(shards[0])


def test_split_shard_renamed(tmp_path: Path) -> None:
    shards = write_split(tmp_path)
    lost = shards[0].rename(tmp_path / "other.gguf")
    with pytest.raises(SourceError, match=r"other.gguf: is a shard of 3, but is not named so"):
        open_gguf(lost)


def test_split_shard_of_another_number(tmp_path: Path) -> None:
    shards = write_split(tmp_path)
    shards[1].write_bytes(shards[2].read_bytes())
    with pytest.raises(
        SourceError, match=r"says it is shard 2 \(from 0\) of 3, but its name says 1"
    ):
        open_gguf(shards[0])


def split_pairs(number: int, count: int, total: int) -> tuple[bytes, ...]:
    return (
        ARCH,
        pair("split.no", 2, pack("<H", number)),
        pair("split.count", 2, pack("<H", count)),
        pair("split.tensors.count", 5, pack("<i", total)),
    )


def test_split_of_another_total(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        file = SOUND.with_(pairs=split_pairs(number, 2, 5), lines=(Line(name),))
        file.write(tmp_path / shard_name("m", number, 2))
    with pytest.raises(SourceError, match="promises 5 tensors in 2 shards, which hold 2"):
        open_gguf(tmp_path / shard_name("m", 0, 2))


def test_split_with_a_tensor_twice(tmp_path: Path) -> None:
    for number in range(2):
        file = SOUND.with_(pairs=split_pairs(number, 2, 2))
        file.write(tmp_path / shard_name("m", number, 2))
    with pytest.raises(SourceError, match=r"tensor .w. is also in m-00001-of-00002\.gguf"):
        open_gguf(tmp_path / shard_name("m", 1, 2))


def test_split_count_is_text(tmp_path: Path) -> None:
    path = keys(pair("split.count", 8, string(b"2"))).write(tmp_path / "m.gguf")
    with pytest.raises(SourceError, match=r"key 'split.count' is '2', not a whole number"):
        open_gguf(path)
