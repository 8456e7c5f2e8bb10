"""What we lay out, the gguf package reads back."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from numpy.typing import NDArray

from quantcli.artifacts.gguf_container import TensorEntry, lay_out, shard_metadata, shard_paths
from quantcli.types import MetaValue, array, boolean, f32, text, u32

KEYS = {
    "general.architecture": text("llama"),
    "general.name": text("Ünïcode 模型"),
    "llama.block_count": u32(3),
    "llama.rope.freq_base": f32(10000.0),
    "flag": boolean(True),
    "small": MetaValue("i8", -3),
    "big": MetaValue("u64", 2**60),
    "precise": MetaValue("f64", 0.1),
    "words": array("str", ["a", "", "ü", b"raw"]),
    "numbers": array("i32", [1, -2, 3]),
    "reals": array("f32", np.array([0.5, -1.5], np.float32)),
    "truths": array("bool", [True, False]),
    "empty": array("str", []),
}


def write(path: Path, layout_keys: dict[str, MetaValue], arrays: dict[str, NDArray]) -> None:
    entries = [TensorEntry(name, a.shape, 0, a.nbytes) for name, a in arrays.items()]
    layout = lay_out(layout_keys, entries)
    whole = bytearray(layout.size)
    whole[: len(layout.header)] = layout.header
    for name, values in arrays.items():
        start = layout.offsets[name]
        whole[start : start + values.nbytes] = values.tobytes()
    path.write_bytes(whole)


@pytest.mark.parametrize("alignment", [None, 32, 64, 4096])
def test_read_back_by_the_gguf_package(tmp_path: Path, alignment: int | None) -> None:
    keys = dict(KEYS)
    if alignment is not None:
        keys["general.alignment"] = u32(alignment)
    rng = np.random.default_rng(0)
    arrays = {
        "token_embd.weight": rng.standard_normal((5, 7), dtype=np.float32),
        "norm.weight": rng.standard_normal(3, dtype=np.float32),
        "experts.weight": rng.standard_normal((2, 3, 4), dtype=np.float32),
    }
    path = tmp_path / "m.gguf"
    write(path, keys, arrays)
    reader = GGUFReader(path)
    assert {key for key in reader.fields if not key.startswith("GGUF.")} == set(keys)
    for key, value in keys.items():
        found = reader.get_field(key).contents()
        if key == "words":
            assert found == ["a", "", "ü", "raw"]
        elif value.kind == "[f32]":
            assert found == list(value.value)
        elif value.kind == "f32":
            assert np.float32(found) == np.float32(value.value)
        else:
            assert found == value.value
    for tensor in reader.tensors:
        want = arrays[tensor.name]
        assert tensor.tensor_type == GGMLQuantizationType.F32
        assert [int(n) for n in reversed(tensor.shape)] == list(want.shape)
        np.testing.assert_array_equal(np.asarray(tensor.data), want)
        assert tensor.data_offset % (alignment or 32) == 0


def test_shards_are_named_and_keyed_as_llama_cpp_does() -> None:
    assert shard_paths(Path("a/m.gguf"), 1) == [Path("a/m.gguf")]
    assert [p.name for p in shard_paths(Path("a/m.gguf"), 2)] == [
        "m-00001-of-00002.gguf",
        "m-00002-of-00002.gguf",
    ]
    first, second = (shard_metadata(KEYS, i, 2, 9, "af") for i in range(2))
    assert first.keys() - KEYS.keys() == {
        "split.no", "split.count", "split.tensors.count", "quantcli.split.id",
    }  # fmt: skip
    assert second == {
        "split.no": MetaValue("u16", 1),
        "split.count": MetaValue("u16", 2),
        "split.tensors.count": MetaValue("i32", 9),
        "quantcli.split.id": MetaValue("str", "af"),
    }
