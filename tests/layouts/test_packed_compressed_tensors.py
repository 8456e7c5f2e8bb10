"""compressed-tensors checkpoints, made and undone by the library itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantcli.sources.hf import HfCheckpoint, open_checkpoint

torch = pytest.importorskip("torch")
from compressed_tensors.compressors import BaseCompressor  # noqa: E402 - after the skip
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.utils import (  # noqa: E402
    calculate_qparams,
    generate_gparam,
)
from safetensors.torch import save_file  # noqa: E402

ROWS, COLUMNS = 72, 96
NAME = "model.layers.0.mlp.up_proj"


def weights(rows: int = ROWS, columns: int = COLUMNS) -> Any:
    generator = torch.Generator().manual_seed(3)
    # Rows of their own sizes and offsets, so that a scale or zero point of another row shows.
    sizes = torch.rand(rows, 1, generator=generator) + 0.2
    return torch.randn(rows, columns, generator=generator) * sizes + sizes - 0.7


def grouped(values: Any, args: Any) -> Any:
    """The weights that share each scale, along the last axis."""
    if args.strategy == "tensor":
        return values.reshape(1, -1)
    if args.strategy == "channel":
        return values[:, None, :]
    if args.strategy == "block":
        height, width = args.block_structure
        rows, columns = values.shape
        blocks = values.reshape(rows // height, height, columns // width, width)
        return blocks.transpose(1, 2).reshape(rows // height, columns // width, -1)
    return values.reshape(len(values), -1, args.group_size)


def compress(values: Any, layout: str, **settings: Any) -> tuple[dict[str, Any], Any, Any]:
    """The library's tensors, what it makes of them, and its scheme; scales are min-max."""
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
    groups = grouped(values, args)
    least, most = groups.amin(-1), groups.amax(-1)
    state = {"weight": values}
    whole = None
    if layout.startswith("nvfp4"):
        whole = generate_gparam(values.min().reshape(1), values.max().reshape(1))
        state["weight_global_scale"] = whole
    scale, zero = calculate_qparams(least, most, args, global_scale=whole)
    state |= {"weight_scale": scale}
    if not args.symmetric:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(layout)
    stored = compressor.compress(dict(state), scheme)
    return stored, compressor.decompress(dict(stored), scheme)["weight"], scheme


def save(folder: Path, modules: dict[str, tuple[dict[str, Any], Any]], **more: Any) -> HfCheckpoint:
    """A checkpoint of modules, each with its stored tensors and its scheme."""
    tensors = {
        f"{module}.{key}": value.contiguous()
        for module, (stored, _) in modules.items()
        for key, value in stored.items()
    }
    groups = {
        f"group_{index}": scheme.model_dump(mode="json") | {"targets": [f"re:.*{module}$"]}
        for index, (module, (_, scheme)) in enumerate(modules.items())
    }
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "compressed-tensors", "config_groups": groups} | more
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": settings})
    )
    return open_checkpoint(folder)


def check(store: HfCheckpoint, name: str, expected: Any) -> None:
    """Every row, some spans of rows, and some columns are exactly what the library gives."""
    theirs = expected.float().numpy()
    rows, columns = theirs.shape
    assert store.tensors[name].shape == theirs.shape
    for start, stop in [(0, rows), (0, 1), (5, 41), (33, 34), (rows - 1, rows), (7, 7)]:
        found = store.read_rows(name, start, stop)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, theirs[start:stop])
    for start, stop in [(0, columns), (31, 33), (columns - 1, columns)]:
        np.testing.assert_array_equal(store.read_columns(name, start, stop), theirs.T[start:stop])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    "strategy",
    [
        {"strategy": "group", "group_size": 32},
        {"strategy": "group", "group_size": 96},
        {"strategy": "channel"},
    ],
    ids=["groups of 32", "one group", "rows"],
)
def test_packed_integers(
    bits: int, symmetric: bool, strategy: dict[str, Any], tmp_path: Path
) -> None:
    stored, expected, scheme = compress(
        weights(), "pack-quantized", num_bits=bits, symmetric=symmetric, **strategy
    )
    store = save(tmp_path, {NAME: (stored, scheme)}, format="pack-quantized")
    assert list(store.tensors) == [f"{NAME}.weight"]
    check(store, f"{NAME}.weight", expected)
    info = store.tensors[f"{NAME}.weight"]
    span = "groups of 32" if strategy.get("group_size") == 32 else "per row"
    assert info.dtype == f"compressed-tensors int{bits}, {span}"
    assert info.nbytes == sum(value.nbytes for value in stored.values())
    store.close()


def test_rows_that_fill_no_word(tmp_path: Path) -> None:
    """The last word of a row, and of a column of zero points, is cut short."""
    stored, expected, scheme = compress(
        weights(37, 45), "pack-quantized", num_bits=3, symmetric=False, strategy="channel"
    )
    store = save(tmp_path, {NAME: (stored, scheme)})
    found = store.read_rows(f"{NAME}.weight", 0, 37)
    np.testing.assert_array_equal(found, expected.numpy())
    np.testing.assert_array_equal(store.read_rows(f"{NAME}.weight", 33, 37), found[33:])
    store.close()


def test_groups_in_an_order_of_their_own(tmp_path: Path) -> None:
    """``weight_g_idx`` as the library wrote it until it dropped the ordering by activation."""
    stored, expected, scheme = compress(
        weights(), "pack-quantized", num_bits=4, strategy="group", group_size=32
    )
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))
    # The codes of column ``order[i]`` move to column i and keep their group.
    packer = BaseCompressor.get_value_from_registry("pack-quantized")
    signed = expected / stored["weight_scale"].repeat_interleave(32, 1)
    whole = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=4, strategy="channel")
    )
    moved = packer.compress(
        {"weight": signed[:, order], "weight_scale": torch.ones(ROWS, 1)}, whole
    )
    stored["weight_packed"] = moved["weight_packed"]
    stored["weight_g_idx"] = (order // 32).int()
    store = save(tmp_path, {NAME: (stored, scheme)})
    check(store, f"{NAME}.weight", expected[:, order])
    store.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scale_dtypes(dtype: str, tmp_path: Path) -> None:
    """The library rounds products to the scale's type; ours, which are exact, round to the same."""
    kind = getattr(torch, dtype)
    stored, expected, scheme = compress(
        weights().to(kind), "pack-quantized", num_bits=4, strategy="group", group_size=32
    )
    assert stored["weight_scale"].dtype == kind
    store = save(tmp_path, {NAME: (stored, scheme)})
    found = torch.from_numpy(store.read_rows(f"{NAME}.weight", 0, ROWS)).to(kind)
    assert torch.equal(found, expected)
    store.close()


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
        ("int-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        ("int-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [24, 32]},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_bytes_with_scales(layout: str, settings: dict[str, Any], tmp_path: Path) -> None:
    stored, expected, scheme = compress(weights(), layout, **settings)
    more = {"input_scale": torch.ones(1)}
    store = save(tmp_path, {NAME: (stored | more, scheme)}, format=layout)
    assert list(store.tensors) == [f"{NAME}.weight"]
    info = store.tensors[f"{NAME}.weight"]
    spans = {"channel": "per row", "tensor": "per tensor", "group": "groups of 32"}
    if layout == "int-quantized":
        span = spans[settings["strategy"]]
        assert info.dtype == f"compressed-tensors int{settings['num_bits']}, {span}"
    else:
        assert info.dtype == "F8_E4M3"
    assert info.nbytes == sum(value.nbytes for value in stored.values())
    check(store, f"{NAME}.weight", expected)
    store.close()


@pytest.mark.parametrize(("layout", "size"), [("nvfp4", 16), ("mxfp4", 32)])
def test_four_bit_floats(layout: str, size: int, tmp_path: Path) -> None:
    strategy = "tensor_group" if size == 16 else "group"
    stored, expected, scheme = compress(
        weights(), f"{layout}-pack-quantized", num_bits=4, type="float", strategy=strategy,
        group_size=size,
    )  # fmt: skip
    store = save(tmp_path, {NAME: (stored, scheme)}, format=f"{layout}-pack-quantized")
    found = torch.from_numpy(store.read_rows(f"{NAME}.weight", 0, ROWS))
    assert found.unique().numel() > 20
    # The library's products are bfloat16, of scales that it divided in bfloat16.
    torch.testing.assert_close(found, expected.float(), rtol=2**-6, atol=0)
    assert store.tensors[f"{NAME}.weight"].dtype == f"compressed-tensors {layout.upper()}"
    store.close()


def test_modelopt(tmp_path: Path) -> None:
    """ModelOpt's NVFP4, as the library's converter takes it: it turns the tensor's scale over."""
    from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter

    stored, expected, scheme = compress(
        weights(), "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group",
        group_size=16,
    )  # fmt: skip
    tensors = {
        f"{NAME}.weight": stored["weight_packed"],
        f"{NAME}.weight_scale": stored["weight_scale"],
        f"{NAME}.weight_scale_2": 1 / stored["weight_global_scale"],
        f"{NAME}.input_scale": torch.ones(1),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    store = open_checkpoint(tmp_path)
    assert list(store.tensors) == [f"{NAME}.weight"]
    assert store.tensors[f"{NAME}.weight"].dtype == "ModelOpt NVFP4"
    converted = ModelOptNvfp4Converter(ignore=["lm_head"], targets=["Linear"]).process(tensors)
    state = {key.removeprefix(f"{NAME}."): value for key, value in converted.items()}
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    theirs = compressor.decompress(state, scheme)["weight"].float()
    found = torch.from_numpy(store.read_rows(f"{NAME}.weight", 0, ROWS))
    torch.testing.assert_close(found, theirs, rtol=2**-6, atol=0)
    torch.testing.assert_close(found, expected.float(), rtol=2**-6, atol=0)
    store.close()


def test_exponents_of_eight_bit_floats(tmp_path: Path) -> None:
    stored, expected, scheme = compress(
        weights(), "mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32,
        scale_dtype=torch.uint8,
    )  # fmt: skip
    assert stored["weight_scale"].dtype == torch.uint8
    store = save(tmp_path, {NAME: (stored, scheme)}, format="mxfp8-quantized")
    found = torch.from_numpy(store.read_rows(f"{NAME}.weight", 0, ROWS))
    assert torch.equal(found.to(expected.dtype), expected)
    store.close()


def test_mixed_precision(tmp_path: Path) -> None:
    """Several groups side by side: each module follows the most specific one that targets it."""
    four = compress(weights(), "pack-quantized", num_bits=4, strategy="group", group_size=32)
    eight = compress(weights(), "pack-quantized", num_bits=8, strategy="channel")
    floats = compress(weights(), "float-quantized", num_bits=8, type="float", strategy="tensor")
    modules = {"model.a.q_proj": four, "model.b.q_proj": eight, "model.c.down_proj": floats}
    tensors = {
        f"{module}.{key}": value.contiguous()
        for module, (stored, _, _) in modules.items()
        for key, value in stored.items()
    }
    save_file(tensors | {"lm_head.weight": weights().contiguous()}, tmp_path / "model.safetensors")
    groups = {
        "wide": four[2].model_dump(mode="json") | {"targets": ["Linear"]},
        "some": floats[2].model_dump(mode="json") | {"targets": ["re:.*down_proj"]},
        "one": eight[2].model_dump(mode="json") | {"targets": ["model.b.q_proj"]},
        "cache": {"targets": ["LlamaAttention"], "weights": None},
    }
    settings = {
        "quant_method": "compressed-tensors", "format": "mixed-precision",
        "config_groups": groups, "ignore": ["lm_head", "re:.*norm"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    store = open_checkpoint(tmp_path)
    assert set(store.tensors) == {*(f"{module}.weight" for module in modules), "lm_head.weight"}
    for module, (_, expected, _) in modules.items():
        check(store, f"{module}.weight", expected)
    assert store.tensors["lm_head.weight"].dtype == "F32"
    store.close()
