"""GPTQ and AWQ checkpoints, packed code by code; AWQ also undone by compressed-tensors."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from support import packed_layouts

from quantcli.errors import SourceError
from quantcli.sources.hf import HfCheckpoint, open_checkpoint

ROWS, COLUMNS, GROUP = 96, 64, 32
NAME = "model.layers.0.mlp.up_proj"
RUNS = np.arange(COLUMNS) // GROUP


def weights(rows: int = ROWS, columns: int = COLUMNS) -> NDArray[np.float32]:
    random = np.random.default_rng(5)
    sizes = random.uniform(0.2, 1.2, (rows, 1))
    return (random.standard_normal((rows, columns)) * sizes + sizes - 0.7).astype(np.float32)


def save(folder: Path, stored: dict[str, Any], module: str = NAME, **settings: Any) -> HfCheckpoint:
    tensors = {f"{module}.{key}": value for key, value in stored.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return open_checkpoint(folder)


def check(store: HfCheckpoint, expected: NDArray[np.float32]) -> None:
    name = f"{NAME}.weight"
    rows, columns = expected.shape
    assert list(store.tensors) == [name]
    assert store.tensors[name].shape == expected.shape
    for start, stop in [(0, rows), (0, 1), (5, 41), (31, 33), (rows - 1, rows), (7, 7)]:
        found = store.read_rows(name, start, stop)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected[start:stop])
    for start, stop in [(0, columns), (31, 33), (columns - 1, columns)]:
        np.testing.assert_array_equal(store.read_columns(name, start, stop), expected.T[start:stop])
    store.close()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_gptq(bits: int, version: int, symmetric: bool, tmp_path: Path) -> None:
    codes, zeros, scales = packed_layouts.quantize(weights(), bits, RUNS, symmetric=symmetric)
    if version == 1:
        zeros = np.maximum(zeros, 1)
    stored = packed_layouts.gptq(codes, zeros, scales, bits, version=version)
    store = save(
        tmp_path, stored, quant_method="gptq", bits=bits, group_size=GROUP, desc_act=False,
        checkpoint_format="gptq" if version == 1 else "gptq_v2",
    )  # fmt: skip
    info = store.tensors[f"{NAME}.weight"]
    assert info.dtype == f"GPTQ int{bits}, groups of 32"
    assert info.nbytes == sum(value.nbytes for value in stored.values())
    check(store, packed_layouts.dequantize(codes, zeros, scales, RUNS))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_that_borrow(bits: int, tmp_path: Path) -> None:
    """Version 1 takes one from a zero point of 0 by borrowing from its neighbour in the word."""
    codes, zeros, scales = packed_layouts.quantize(weights(), bits, RUNS, symmetric=False)
    zeros[1::5] = 0
    stored = packed_layouts.gptq(codes, zeros, scales, bits, version=1)
    store = save(tmp_path, stored, quant_method="gptq", bits=bits, group_size=GROUP)
    check(store, packed_layouts.dequantize(codes, zeros, scales, RUNS))


@pytest.mark.parametrize("bits", [3, 4])
def test_groups_in_the_order_of_activations(bits: int, tmp_path: Path) -> None:
    order = np.random.default_rng(2).permutation(RUNS)
    codes, zeros, scales = packed_layouts.quantize(weights(), bits, order, symmetric=False)
    zeros = np.maximum(zeros, 1)
    stored = packed_layouts.gptq(codes, zeros, scales, bits, version=1)
    store = save(
        tmp_path, stored | {"g_idx": order.astype(np.int32)},
        quant_method="gptq", bits=bits, group_size=GROUP, desc_act=True,
    )  # fmt: skip
    check(store, packed_layouts.dequantize(codes, zeros, scales, order))


def test_one_group_a_row(tmp_path: Path) -> None:
    whole = np.zeros(COLUMNS, np.int64)
    codes, zeros, scales = packed_layouts.quantize(weights(), 4, whole, symmetric=True)
    stored = packed_layouts.gptq(codes, zeros, scales, 4, version=1)
    stored["g_idx"] = whole.astype(np.int32)
    store = save(tmp_path, stored, quant_method="gptq", bits=4, group_size=-1)
    assert store.tensors[f"{NAME}.weight"].dtype == "GPTQ int4, per row"
    check(store, packed_layouts.dequantize(codes, zeros, scales, whole))


def test_settings_of_single_modules(tmp_path: Path) -> None:
    """GPTQModel's ``dynamic``: the first pattern that fits a module changes its settings."""
    codes, zeros, scales = packed_layouts.quantize(weights(), 8, RUNS, symmetric=True)
    stored = packed_layouts.gptq(codes, zeros, scales, 8, version=2)
    dynamic = {
        "-:.*down": {},
        r"+:.*\.up_proj": {"bits": 8, "group_size": GROUP},
        ".*": {"bits": 2},
    }
    store = save(
        tmp_path, stored, quant_method="gptq", bits=4, group_size=16,
        checkpoint_format="gptq_v2", dynamic=dynamic,
    )  # fmt: skip
    assert store.tensors[f"{NAME}.weight"].dtype == "GPTQ int8, groups of 32"
    check(store, packed_layouts.dequantize(codes, zeros, scales, RUNS))


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Reading 64 rows costs them and a strip of codes, not the matrix."""
    rows, columns = 4096, 1024
    stored = {
        "qweight": np.zeros((columns // 8, rows), np.int32),
        "qzeros": np.zeros((columns // 128, rows // 8), np.int32),
        "scales": np.ones((columns // 128, rows), np.float16),
    }
    store = save(tmp_path, stored, quant_method="gptq", bits=4, group_size=128)
    tracemalloc.start()
    for start in range(0, rows, 64):
        assert (store.read_rows(f"{NAME}.weight", start, start + 64) == -1).all()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * (64 * columns * 4)
    tracemalloc.start()
    store.read_rows(f"{NAME}.weight", 0, rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.6 * (rows * columns * 4)
    store.close()


def by_compressed_tensors(stored: dict[str, Any], *, has_zeros: bool) -> NDArray[np.float32]:
    """AWQ's tensors through the library's converter and its own decompression."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    converter = AutoAWQConverter(group_size=GROUP, zero_point=has_zeros)
    tensors = {f"{NAME}.{key}": torch.from_numpy(value) for key, value in stored.items()}
    tensors[f"{NAME}.scales"] = tensors[f"{NAME}.scales"].float()
    state = {
        key.removeprefix(f"{NAME}."): value for key, value in converter.process(tensors).items()
    }
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=4, symmetric=not has_zeros, strategy="group", group_size=GROUP
        ),
    )
    unpacked = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)
    return unpacked["weight"].numpy()


@pytest.mark.parametrize("has_zeros", [True, False], ids=["zero points", "none"])
def test_awq(has_zeros: bool, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    codes, zeros, scales = packed_layouts.quantize(weights(), 4, RUNS, symmetric=not has_zeros)
    stored = packed_layouts.awq(codes, zeros, scales)
    if not has_zeros:
        del stored["qzeros"]
    store = save(
        tmp_path, stored, quant_method="awq", bits=4, group_size=GROUP, version="gemm",
        zero_point=has_zeros, modules_to_not_convert=None,
    )  # fmt: skip
    assert store.tensors[f"{NAME}.weight"].dtype == "AWQ int4, groups of 32"
    expected = by_compressed_tensors(stored, has_zeros=has_zeros)
    np.testing.assert_array_equal(expected, packed_layouts.dequantize(codes, zeros, scales, RUNS))
    check(store, expected)


@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round"])
def test_autorounds_label_over_gptq(method: str, tmp_path: Path) -> None:
    codes, zeros, scales = packed_layouts.quantize(weights(), 4, RUNS, symmetric=True)
    stored = packed_layouts.gptq(codes, zeros, scales, 4, version=1)
    store = save(
        tmp_path, stored, quant_method=method, packing_format="auto_round:auto_gptq", bits=4,
        group_size=GROUP, sym=True,
    )  # fmt: skip
    check(store, packed_layouts.dequantize(codes, zeros, scales, RUNS))


def test_autorounds_label_over_awq(tmp_path: Path) -> None:
    codes, zeros, scales = packed_layouts.quantize(weights(), 4, RUNS, symmetric=False)
    store = save(
        tmp_path, packed_layouts.awq(codes, zeros, scales), quant_method="auto-round",
        packing_format="auto_round:auto_awq", bits=4, group_size=GROUP,
    )  # fmt: skip
    check(store, packed_layouts.dequantize(codes, zeros, scales, RUNS))


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:gptqmodel"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_autorounds_zero_points_as_they_are(packing: str, bits: int, tmp_path: Path) -> None:
    codes, zeros, scales = packed_layouts.quantize(weights(), bits, RUNS, symmetric=False)
    stored = packed_layouts.gptq(codes, zeros, scales, bits, version=2)
    store = save(
        tmp_path, stored, quant_method="auto-round", packing_format=packing, bits=bits,
        group_size=GROUP, sym=False,
    )  # fmt: skip
    check(store, packed_layouts.dequantize(codes, zeros, scales, RUNS))


@pytest.mark.parametrize(
    "extra",
    [
        {NAME: {"bits": 8}},
        {r".*up_proj.*": {"bits": 8}},
        {"mlp[.]up": {"bits": 8}, ".*": {"bits": 2}},
        {".*": {"bits": 2}, NAME: {"bits": 8}},
        {"model.layers.0.mlp.up": {"bits": 2}, NAME: {"bits": 8}},
    ],
    ids=["name", "expression", "first", "name first", "a shorter name"],
)
def test_autorounds_settings_of_one_module(extra: dict[str, Any], tmp_path: Path) -> None:
    codes, zeros, scales = packed_layouts.quantize(weights(), 8, RUNS, symmetric=True)
    stored = packed_layouts.gptq(codes, zeros, scales, 8, version=1)
    store = save(
        tmp_path, stored, quant_method="auto-round", packing_format="auto_round:auto_gptq", bits=4,
        group_size=GROUP, sym=True, extra_config=extra,
    )  # fmt: skip
    check(store, packed_layouts.dequantize(codes, zeros, scales, RUNS))


def test_autorounds_settings_of_a_module_that_is_kept(tmp_path: Path) -> None:
    """Its name is no expression for another whose name begins with it."""
    codes, zeros, scales = packed_layouts.quantize(weights(), 4, RUNS, symmetric=True)
    kept = NAME.removesuffix("_proj")
    tensors = {
        f"{NAME}.{key}": value
        for key, value in packed_layouts.gptq(codes, zeros, scales, 4, version=1).items()
    }
    save_file(tensors | {f"{kept}.weight": weights()}, tmp_path / "model.safetensors")
    settings = {
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4,
        "group_size": GROUP, "extra_config": {kept: {"bits": 16}},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    store = open_checkpoint(tmp_path)
    found = store.read_rows(f"{NAME}.weight", 0, ROWS)
    np.testing.assert_array_equal(found, packed_layouts.dequantize(codes, zeros, scales, RUNS))
    store.close()


@pytest.mark.parametrize(
    ("extra", "said"),
    [(["x"], "extra_config is not an object"), ({"(": {"bits": 8}}, "no regular expression")],
)
def test_autorounds_settings_that_are_wrong(extra: Any, said: str, tmp_path: Path) -> None:
    codes, zeros, scales = packed_layouts.quantize(weights(), 4, RUNS, symmetric=True)
    stored = packed_layouts.gptq(codes, zeros, scales, 4, version=1)
    with pytest.raises(SourceError, match=said):
        save(
            tmp_path, stored, quant_method="auto-round", packing_format="auto_round:auto_gptq",
            bits=4, group_size=GROUP, extra_config=extra,
        )  # fmt: skip


def test_autorounds_folder_in_which_every_module_is_kept(tmp_path: Path) -> None:
    """As it makes one without a model at hand, with a group for each row."""
    kept = {"bits": 16, "data_type": "float"}
    plain = {"model.a_proj.weight": weights(), "model.b_proj.weight": weights()}
    save_file(plain, tmp_path / "model.safetensors")
    settings = {
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4,
        "group_size": -1, "extra_config": {"model.a_proj": kept, "model.b_proj": kept},
    }  # fmt: skip

    def write() -> None:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))

    write()
    store = open_checkpoint(tmp_path)
    for name, wanted in plain.items():
        assert store.tensors[name].dtype == "F32"
        assert np.array_equal(store.read_rows(name, 0, len(wanted)), wanted)
    store.close()
    settings["extra_config"] = {"model.a_proj": kept, "model.b_proj": {"bits": 8}}
    write()
    with pytest.raises(SourceError, match="but no tensor is"):
        open_checkpoint(tmp_path)


def test_another_of_autorounds_layouts_is_refused(tmp_path: Path) -> None:
    codes, zeros, scales = packed_layouts.quantize(weights(), 4, RUNS, symmetric=True)
    stored = packed_layouts.gptq(codes, zeros, scales, 4, version=1)
    with pytest.raises(SourceError, match="quantized with auto-round, which is not read"):
        save(tmp_path, stored, quant_method="auto-round", packing_format="itrex", bits=4)


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_settings_in_a_file_of_their_own(file: str, tmp_path: Path) -> None:
    gptq = file == "quantize_config.json"
    codes, zeros, scales = packed_layouts.quantize(weights(), 4, RUNS, symmetric=False)
    if gptq:
        zeros = np.maximum(zeros, 1)
    stored = (
        packed_layouts.gptq(codes, zeros, scales, 4, version=1)
        if gptq
        else packed_layouts.awq(codes, zeros, scales)
    )
    settings = {"bits": 4, "group_size": GROUP, "desc_act": False} if gptq else {
        "w_bit": 4, "q_group_size": GROUP, "zero_point": True, "version": "GEMM",
    }  # fmt: skip
    save_file({f"{NAME}.{k}": v for k, v in stored.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(settings))
    check(open_checkpoint(tmp_path), packed_layouts.dequantize(codes, zeros, scales, RUNS))
    (tmp_path / file).write_text("[")
    with pytest.raises(SourceError, match=rf"{file}: is not JSON"):
        open_checkpoint(tmp_path)
