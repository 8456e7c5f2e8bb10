"""A checkpoint folder broken in one named way: index, shards, config.json, quantization, FP8."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.broken import entry, safetensors

from quantcli.errors import SourceError
from quantcli.sources.hf import open_checkpoint

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


class Case(NamedTuple):
    build: Callable[[Path], object]
    sentence: str
    file: str
    tensor: str | None = None


def config(folder: Path, **settings: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | settings))


def shard(folder: Path, name: str, *tensors: str) -> None:
    header = {t: entry([2, 4], 32 * i, 32 * (i + 1)) for i, t in enumerate(tensors)}
    safetensors(folder / name, header, bytes(32 * len(tensors)))


def index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def sharded(
    weight_map: Any,
    first: tuple[str, ...] = ("a",),
    second: tuple[str, ...] | None = ("b",),
) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        config(folder)
        index(folder, weight_map)
        shard(folder, FIRST, *first)
        if second is not None:
            shard(folder, SECOND, *second)

    return build


def single(
    tensors: dict[str, tuple[str, list[int]]] | None = None, **settings: Any
) -> Callable[[Path], None]:
    """A model of one file; tensors are name -> (dtype, shape), one byte for each weight of FP8."""
    widths = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "I8": 1, "I32": 4}

    def build(folder: Path) -> None:
        config(folder, **settings)
        header: dict[str, Any] = {}
        place = 0
        for name, (dtype, shape) in (tensors or {"a": ("F32", [2, 4])}).items():
            size = widths[dtype]
            for extent in shape:
                size *= extent
            header[name] = entry(shape, place, place + size, dtype)
            place += size
        safetensors(folder / "model.safetensors", header, bytes(place))

    return build


def only(*names: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        config(folder)
        for name in names:
            (folder / name).write_bytes(b"x")

    return build


def text(name: str, content: bytes) -> Callable[[Path], None]:
    """A sound model of which one file is replaced."""

    def build(folder: Path) -> None:
        single()(folder)
        (folder / name).write_bytes(content)

    return build


def without_config(folder: Path) -> None:
    single()(folder)
    (folder / "config.json").unlink()


def both_kinds(folder: Path) -> None:
    sharded({"a": FIRST, "b": SECOND})(folder)
    shard(folder, "model.safetensors", "a")


def quantized(method: str, **settings: Any) -> Callable[[Path], None]:
    return single(quantization_config={"quant_method": method} | settings)


FP8 = {"quantization_config": {"quant_method": "fp8"}}
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
PACKED = {"weights": {"type": "int", "num_bits": 4}}
FLOAT8 = {"type": "float", "num_bits": 8}
W = ("F8_E4M3", [4, 8])

CASES: dict[str, Case] = {
    "index is not JSON": Case(
        lambda f: (sharded({})(f), (f / INDEX).write_text("{")), "is not JSON", INDEX
    ),
    "index is a list": Case(
        lambda f: (sharded({})(f), (f / INDEX).write_text("[]")), "a JSON list where", INDEX
    ),
    "index without a map": Case(sharded(None), "has no 'weight_map'", INDEX),
    "index with an empty map": Case(sharded({}), "has no 'weight_map'", INDEX),
    "shard is a number": Case(sharded({"a": 1}), "is in 1, not a safetensors file", INDEX, "a"),
    "shard is PyTorch's": Case(
        sharded({"a": "pytorch_model.bin"}), "not a safetensors file", INDEX, "a"
    ),
    "shard outside of the folder": Case(
        sharded({"a": "../" + FIRST}), "outside of the folder", INDEX, "a"
    ),
    "shard missing": Case(
        sharded({"a": FIRST, "b": SECOND, "c": SECOND}, second=None),
        f"names the shard {SECOND}, which is not there (2 tensors)",
        INDEX,
    ),
    "tensor missing": Case(
        sharded({"a": FIRST, "b": SECOND, "c": SECOND}), "no shard does", INDEX, "c"
    ),
    "tensor in another shard": Case(
        sharded({"a": FIRST, "b": SECOND, "c": SECOND}, first=("a", "c")),
        f"says that {SECOND} holds tensor 'c', but {FIRST} does",
        INDEX,
        "c",
    ),
    "tensor not in the index": Case(
        sharded({"a": FIRST, "b": SECOND}, second=("b", "d")),
        f"does not name tensor 'd', which {SECOND} holds",
        INDEX,
        "d",
    ),
    "tensor in two shards": Case(
        sharded({"a": FIRST, "b": SECOND}, second=("b", "a")), "is in two shards", FIRST, "a"
    ),
    "broken shard": Case(
        lambda f: (
            sharded({"a": FIRST, "b": SECOND})(f),
            (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-1]),
        ),
        "ends at byte 32 of the data, but the file holds only 31",
        SECOND,
        "b",
    ),
    "a single file and shards": Case(both_kinds, "holds both model.safetensors and an index", ""),
    "shards without index": Case(only(FIRST, SECOND), f"holds shards but no {INDEX}", ""),
    "PyTorch weights alone": Case(
        only("pytorch_model.bin", "training_args.bin"), "save_pretrained", "pytorch_model.bin"
    ),
    "an adapter": Case(only("adapter_model.safetensors"), "an adapter, not a whole model", ""),
    "Mistral's layout": Case(
        only("consolidated.safetensors"), "in Mistral's own layout", "consolidated.safetensors"
    ),
    "GGUF files": Case(only("m-Q4_K_M.gguf"), "name the file itself", "m-Q4_K_M.gguf"),
    "another name": Case(only("weights.safetensors"), "holds weights.safetensors but no", ""),
    "no weights": Case(only(), "holds no model.safetensors and no", ""),
    "config missing": Case(without_config, "holds no config.json", ""),
    "config is not JSON": Case(text("config.json", b"{,}"), "is not JSON", "config.json"),
    "config is not UTF-8": Case(text("config.json", b'{"\xff'), "not UTF-8 at", "config.json"),
    "config is a number": Case(text("config.json", b"3"), "a JSON int where", "config.json"),
    "config is nested without end": Case(
        text("config.json", b'{"a":' * 50_000), "is not JSON", "config.json"
    ),
    "GPTQ of floats": Case(quantized("gptq", bits=4), "(gptq), but no tensor is", "config.json"),
    "an unknown method": Case(quantized("hqq"), "already quantized with hqq", "config.json"),
    "MXFP4 of floats": Case(quantized("mxfp4"), "(mxfp4), but no tensor is", "config.json"),
    "compressed-tensors of integers": Case(
        quantized("compressed-tensors", format="pack-quantized", config_groups={"g": PACKED}),
        "(compressed-tensors), but no tensor is",
        "config.json",
    ),
    "compressed-tensors without groups": Case(
        quantized("compressed-tensors", format="float-quantized"),
        "(compressed-tensors), but no tensor is",
        "config.json",
    ),
    "compressed-tensors of two structures": Case(
        quantized(
            "compressed-tensors",
            config_groups={
                "g": {"weights": FLOAT8 | {"block_structure": [128, 128]}},
                "h": {"weights": FLOAT8 | {"block_structure": [64, 64]}},
            },
        ),
        "two groups target 'Linear'",
        "config.json",
    ),
    "ModelOpt's NVFP4 over AWQ": Case(
        quantized("modelopt", quant_algo="NVFP4_AWQ"), "with modelopt (NVFP4_AWQ)", "config.json"
    ),
    "a method without a name": Case(
        single(quantization_config={}), "already quantized with unknown", "config.json"
    ),
    "quantization of a text model": Case(
        single(text_config={"quantization_config": {"quant_method": "hqq"}}),
        "already quantized with hqq",
        "config.json",
    ),
    "quantization is text": Case(
        single(quantization_config="fp8"), "quantization_config is not an object", "config.json"
    ),
    "block of one number": Case(
        single(quantization_config={"quant_method": "fp8", "weight_block_size": [128]}),
        "two positive whole numbers belong there",
        "config.json",
    ),
    "block of no rows": Case(
        single(quantization_config={"quant_method": "fp8", "weight_block_size": [0, 128]}),
        "two positive whole numbers belong there",
        "config.json",
    ),
    "FP8 without scale": Case(
        single({"w.weight": W}, **FP8),
        "is FP8 but has no scale beside it",
        "model.safetensors",
        "w.weight",
    ),
    "scale of integers": Case(
        single({"w.weight": W, "w.weight_scale": ("I32", [1])}, **FP8),
        "is the scale of an FP8 weight but has dtype I32",
        "model.safetensors",
        "w.weight_scale",
    ),
    "scale of blocks of unknown size": Case(
        single({"w.weight": W, "w.weight_scale_inv": ("F32", [2, 2])}, **FP8),
        "config.json has no weight_block_size",
        "model.safetensors",
        "w.weight_scale_inv",
    ),
    "scale of the wrong number of blocks": Case(
        single({"w.weight": W, "w.weight_scale_inv": ("F32", [2, 2])}, **BLOCKS),
        "with shape [4, 8] and blocks of [128, 128]",
        "model.safetensors",
        "w.weight_scale_inv",
    ),
    "scale of the wrong number of rows": Case(
        single({"w.weight": W, "w.weight_scale": ("F32", [5])}, **FP8),
        "has shape [5], which scales neither the whole, the rows nor the blocks of 'w.weight'",
        "model.safetensors",
        "w.weight_scale",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sentence(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = tmp_path / "model"
    folder.mkdir()
    case.build(folder)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(folder)
    said = str(caught.value)
    assert case.sentence in said
    assert str(folder) in said
    assert case.file in said
    assert case.tensor is None or f"tensor {case.tensor!r}" in said
    assert "\n" not in said


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no such folder"):
        open_checkpoint(tmp_path / "absent")


def test_nothing_stays_open(tmp_path: Path) -> None:
    """A refused checkpoint releases the shards that were opened before the fault was seen."""
    sharded({"a": FIRST, "b": SECOND, "c": SECOND})(tmp_path)
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(SourceError):
            open_checkpoint(tmp_path)
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_integers_are_listed_but_not_read(tmp_path: Path) -> None:
    single({"a": ("F32", [2, 4]), "q": ("I8", [2, 4])})(tmp_path)
    store = open_checkpoint(tmp_path)
    assert store.tensors["q"].dtype == "I8"
    with pytest.raises(SourceError, match=r"model.safetensors: tensor 'q' has dtype I8"):
        store.read_rows("q", 0, 1)
    with pytest.raises(SourceError, match=r"tensor 'q' has dtype I8"):
        store.read_columns("q", 0, 1)
    store.close()


def test_file_shrinks_while_open(tmp_path: Path) -> None:
    single()(tmp_path)
    store = open_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(SourceError, match=r"ends at byte \d+, 4 bytes early"):
        store.read_rows("a", 0, 2)
    store.close()
