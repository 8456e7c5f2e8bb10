"""Rows and columns of a checkpoint, against torch and the safetensors library."""

from __future__ import annotations

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantcli.sources.hf import HfCheckpoint, open_checkpoint

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402 - after the skip

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"


def checkpoint(folder: Path, tensors: dict[str, Any], **config: Any) -> HfCheckpoint:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return open_checkpoint(folder)


def random(*shape: int, dtype: Any = None, seed: int = 0) -> Any:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values if dtype is None else values.to(dtype)


def as_float(array: NDArray[Any]) -> NDArray[np.float64]:
    return array.astype(np.float64)


def test_real_model_row_by_row() -> None:
    reference = load_file(MINI / "model.safetensors")
    store = open_checkpoint(MINI)
    assert store.tensors.keys() == reference.keys()
    assert store.config["model_type"] == "llama"
    for name, theirs in reference.items():
        flat = theirs.reshape(-1, theirs.shape[-1])
        for start in range(0, flat.shape[0], 1000):
            stop = min(start + 1000, flat.shape[0])
            rows = store.read_rows(name, start, stop)
            assert str(rows.dtype) == "bfloat16"
            assert (as_float(rows) == flat[start:stop].double().numpy()).all()
    store.close()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes_come_as_stored(dtype: str, tmp_path: Path) -> None:
    weights = random(3, 4, 6, dtype=getattr(torch, dtype))
    store = checkpoint(tmp_path, {"w": weights, "scalar": weights[0, 0, 0].clone()})
    rows = store.read_rows("w", 5, 9)
    assert str(rows.dtype) == dtype
    assert rows.flags.c_contiguous
    assert rows.flags.writeable
    assert (as_float(rows) == weights.reshape(12, 6)[5:9].double().numpy()).all()
    assert as_float(store.read_rows("scalar", 0, 1)) == weights[0, 0, 0].double().item()
    assert store.read_rows("w", 7, 7).shape == (0, 6)
    store.close()


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (0, 1), (2, 5), (6, 7), (3, 3)])
def test_columns_are_transposed(start: int, stop: int, tmp_path: Path) -> None:
    weights = random(5, 7, dtype=torch.bfloat16)
    store = checkpoint(tmp_path, {"w": weights})
    columns = store.read_columns("w", start, stop)
    assert columns.flags.c_contiguous
    assert columns.shape == (stop - start, 5)
    assert (as_float(columns) == weights.T[start:stop].double().numpy()).all()
    store.close()


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (7, 14), (16, 20), (20, 21), (8, 8), (0, 0)])
def test_columns_of_a_stack_are_counted_through(start: int, stop: int, tmp_path: Path) -> None:
    weights = random(3, 5, 7)
    store = checkpoint(tmp_path, {"w": weights})
    through = weights.permute(0, 2, 1).reshape(21, 5)
    assert (store.read_columns("w", start, stop) == through[start:stop].numpy()).all()
    with pytest.raises(IndexError):
        store.read_columns("w", 5, 9)
    store.close()


@pytest.mark.parametrize("span", [(-1, 2), (2, 1), (0, 6)])
def test_ranges_beyond_the_tensor(span: tuple[int, int], tmp_path: Path) -> None:
    store = checkpoint(tmp_path, {"w": random(5, 5)})
    with pytest.raises(IndexError):
        store.read_rows("w", *span)
    with pytest.raises(IndexError):
        store.read_columns("w", *span)
    store.close()


def test_shards(tmp_path: Path) -> None:
    parts = [{"a": random(4, 4), "b": random(2, 4, seed=1)}, {"c": random(3, 4, seed=2)}]
    weight_map = {}
    for number, tensors in enumerate(parts):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file(tensors, tmp_path / file)
        weight_map |= dict.fromkeys(tensors, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    store = open_checkpoint(tmp_path)
    assert [path.name for path in store.files] == sorted(set(weight_map.values()))
    for name, weights in (parts[0] | parts[1]).items():
        assert (store.read_rows(name, 0, len(weights)) == weights.numpy()).all()
        assert store.tensors[name].file.name == weight_map[name]
    store.close()


def test_threads_share_a_file(tmp_path: Path) -> None:
    weights = random(512, 33)
    store = checkpoint(tmp_path, {"w": weights})
    expected = weights.numpy()

    def same(row: int) -> bool:
        return bool((store.read_rows("w", row, row + 2) == expected[row : row + 2]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(same, list(range(510)) * 4))
    store.close()


def test_memory_is_what_was_asked_for(tmp_path: Path) -> None:
    store = checkpoint(tmp_path, {"w": torch.zeros(4096, 1024)})  # 16 MiB
    slab = 64 * 1024 * 4
    tracemalloc.start()
    for start in range(0, 4096, 64):
        store.read_rows("w", start, start + 64)
    for start in range(0, 1024, 16):
        store.read_columns("w", start, start + 16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A transposed slab exists twice for a moment.
    assert peak < 2.5 * slab
    store.close()


# ---- FP8


def fp8(*shape: int) -> Any:
    return random(*shape).clamp(-400, 400).to(torch.float8_e4m3fn)


def spread(scale: Any, shape: tuple[int, ...], block: tuple[int, int]) -> Any:
    """A grid of scales, one for each weight."""
    big = scale.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return big[..., : shape[-2], : shape[-1]]


SCALES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int] | None]] = {
    "tensor, no axes": ((40, 24), (), None),
    "tensor, one number": ((40, 24), (1,), None),
    "tensor, matrix of one": ((40, 24), (1, 1), None),
    "tensor of a stack": ((3, 40, 24), (1,), None),
    "rows": ((40, 24), (40,), None),
    "rows as a column": ((40, 24), (40, 1), None),
    "matrices of a stack": ((3, 40, 24), (3,), None),
    "matrices of a stack, with axes": ((3, 40, 24), (3, 1, 1), None),
    "rows of a stack": ((3, 40, 24), (3, 40, 1), None),
    "blocks that fit": ((40, 24), (5, 3), (8, 8)),
    "blocks cut at both edges": ((40, 24), (3, 4), (16, 7)),
    "blocks larger than the matrix": ((40, 24), (1, 1), (128, 128)),
    "blocks wide and low": ((40, 24), (40, 2), (1, 16)),
    "blocks of a stack": ((3, 40, 24), (3, 3, 4), (16, 7)),
    "a vector": ((24,), (1,), None),
}
SCALE_DTYPES = ["float32", "bfloat16", "float16", "float64", "float8_e8m0fnu"]


@pytest.mark.parametrize("case", SCALES)
@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_fp8_scales(case: str, suffix: str, tmp_path: Path) -> None:
    shape, grid, block = SCALES[case]
    weights = fp8(*shape)
    scale = random(*grid, seed=1).abs() + 0.01
    settings: dict[str, Any] = {"quant_method": "fp8"}
    if block is not None:
        settings["weight_block_size"] = list(block)
        factors = spread(scale, shape, block)
    elif len(grid) < len(shape) and scale.numel() > 1:
        factors = scale.reshape(grid + (1,) * (len(shape) - len(grid)))
    else:
        factors = scale
    expected = (weights.float() * factors).reshape(-1, shape[-1]).numpy()
    store = checkpoint(
        tmp_path,
        {"m.weight": weights, f"m.weight{suffix}": scale, "m.input_scale": torch.ones(1)},
        quantization_config=settings,
    )
    assert set(store.tensors) == {"m.weight"}
    assert store.tensors["m.weight"].dtype == "F8_E4M3"
    rows = len(expected)
    for start, stop in [(0, rows), (0, 1), (rows // 3, rows // 2 + 1), (rows - 1, rows), (0, 0)]:
        found = store.read_rows("m.weight", start, stop)
        assert found.dtype == np.float32
        assert found.tobytes() == expected[start:stop].tobytes()
    if len(shape) == 2:
        for start, stop in [(0, 24), (0, 1), (5, 17), (23, 24), (6, 6)]:
            columns = store.read_columns("m.weight", start, stop)
            assert columns.tobytes() == np.ascontiguousarray(expected[:, start:stop].T).tobytes()
    store.close()


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_fp8_scale_dtypes(dtype: str, tmp_path: Path) -> None:
    weights = fp8(8, 8)
    scale = (torch.tensor([[0.5, 4.0], [2.0, 0.125]])).to(getattr(torch, dtype))
    store = checkpoint(
        tmp_path,
        {"w": weights, "w_scale_inv": scale},
        quantization_config={"quant_method": "fp8", "weight_block_size": [4, 4]},
    )
    expected = weights.float() * spread(scale.float(), (8, 8), (4, 4))
    assert (store.read_rows("w", 0, 8) == expected.numpy()).all()
    store.close()


def test_every_fp8_code(tmp_path: Path) -> None:
    """All 256 codes, NaN as NaN and the subnormal ones too."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(16, 16)
    store = checkpoint(tmp_path, {"w": codes, "w_scale": torch.tensor(3.0)})
    found = store.read_rows("w", 0, 16)
    np.testing.assert_array_equal(found, (codes.float() * 3.0).numpy())
    assert np.isnan(found).sum() == 2
    store.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}},
        },
    ],
    ids=["FBGEMM", "ModelOpt", "compressed-tensors"],
)
def test_methods_of_fp8(settings: dict[str, Any], tmp_path: Path) -> None:
    weights, scale = fp8(6, 4), torch.rand(6, 1) + 0.1
    store = checkpoint(
        tmp_path,
        {"w.weight": weights, "w.weight_scale": scale, "w.k_scale": torch.ones(1)},
        quantization_config=settings,
    )
    assert set(store.tensors) == {"w.weight"}
    assert (store.read_rows("w.weight", 0, 6) == (weights.float() * scale).numpy()).all()
    store.close()


def test_blocks_of_compressed_tensors(tmp_path: Path) -> None:
    weights, scale = fp8(6, 4), torch.rand(2, 2) + 0.1
    group = {"weights": {"type": "float", "num_bits": 8, "block_structure": [4, 2]}}
    store = checkpoint(
        tmp_path,
        {"w": weights, "w_scale": scale},
        quantization_config={"quant_method": "compressed-tensors", "config_groups": {"g": group}},
    )
    expected = weights.float() * spread(scale, (6, 4), (4, 2))
    assert (store.read_rows("w", 0, 6) == expected.numpy()).all()
    store.close()


def test_a_scale_of_no_fp8_weight_is_a_tensor(tmp_path: Path) -> None:
    """Models may have parameters of such names; only those of FP8 weights disappear."""
    store = checkpoint(
        tmp_path, {"attn": random(4, 4), "attn_scale": random(4), "v_scale": random(1)}
    )
    assert set(store.tensors) == {"attn", "attn_scale", "v_scale"}
    store.close()


def test_fp8_memory_is_bounded(tmp_path: Path) -> None:
    store = checkpoint(
        tmp_path,
        {"w": torch.zeros(8192, 1024, dtype=torch.float8_e4m3fn), "w_scale_inv": torch.ones(64, 8)},
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )
    slab = 256 * 1024 * 4
    tracemalloc.start()
    for start in range(0, 8192, 256):
        store.read_rows("w", start, start + 256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Codes (a quarter), floats, and the widened indices of one strip (2 MiB).
    assert peak < 2 * slab + (3 << 20)
    store.close()
