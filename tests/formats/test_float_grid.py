"""FP8 and FP4 grids: compressed-tensors' own scales and codes, and what the search gains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from quantcli.formats import get_format, native
from quantcli.formats.float_grid import BLOCK, FloatGrid
from quantcli.formats.integer import GridCodes

GRIDS = {
    "FP8_DYNAMIC": FloatGrid("E4M3", "channel"),
    "FP8_BLOCK": FloatGrid("E4M3", "block"),
    "FP8": FloatGrid("E4M3", "tensor"),
    "NVFP4A16": FloatGrid("E2M1", "group", 16, "E4M3"),
    "MXFP4A16": FloatGrid("E2M1", "group", 32, "E8M0"),
    "MXFP8A16": FloatGrid("E4M3", "group", 32, "E8M0"),
}
"""By the scheme's name in compressed-tensors."""


def draw(rows: int = 256, columns: int = 512) -> NDArray[np.float32]:
    """Rows of different widths, with zeros, a group of zeros and a row of them."""
    generator = np.random.default_rng(0)
    width = generator.lognormal(0, 1, (rows, 1))
    weights = (0.02 * width * generator.standard_normal((rows, columns))).astype(np.float32)
    weights[3, :32] = weights[4] = 0
    return weights


def encode(grid: FloatGrid, weights: NDArray[np.float32], search: Any = "minmax") -> GridCodes:
    bound = grid.bind(float(np.abs(weights).max()))
    if grid.strategy == "tensor":
        scales, _ = bound.fit_tensor(lambda: [weights])
    else:
        scales, _ = bound.fit(weights, None, search)
    return GridCodes(bound.quantize(weights, scales), scales, None, bound.whole)


def decode(grid: FloatGrid, coded: GridCodes) -> NDArray[np.float32]:
    bound = grid if coded.whole is None else grid.with_whole(coded.whole)
    return bound.dequantize(coded)


@pytest.mark.parametrize("name", GRIDS)
def test_scales_and_codes_are_those_of_compressed_tensors(name: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weights, grid = draw(), GRIDS[name]
    args = preset_name_to_scheme(name, ["Linear"]).weights
    tensor = torch.from_numpy(weights)
    groups = {
        "channel": tensor[:, None],
        "tensor": tensor.reshape(1, 1, -1),
        "block": tensor.reshape(2, BLOCK, 4, BLOCK).transpose(1, 2).reshape(2, 4, -1),
        "group": tensor.reshape(256, -1, grid.group_size or 1),
    }[grid.strategy]
    whole = generate_gparam(tensor.min(), tensor.max()) if grid.scales == "E4M3" else None
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=whole)
    scales = scales.reshape(groups.shape[:2]) if grid.strategy != "tensor" else scales
    found = encode(grid, weights)
    expected = scales.float() if whole is None else scales.float() / whole
    step = BLOCK if grid.strategy == "block" else 1
    assert np.array_equal(found.scales[::step].reshape(expected.shape), expected.numpy())
    codes = quantize(tensor, scales, zeros, args, global_scale=whole).float().numpy()
    plain = replace(grid, scales="float")
    ours = plain.dequantize(GridCodes(found.codes, np.ones((1, 1), np.float32)))
    assert np.array_equal(ours, codes)


@pytest.mark.parametrize("kind", ["E4M3", "E2M1"])
def test_codes_are_nearest_with_ties_to_even(kind: Any) -> None:
    """Against the rounding of ml_dtypes, on all values, the middles between them, and beyond."""
    dtype = ml_dtypes.float8_e4m3fn if kind == "E4M3" else ml_dtypes.float4_e2m1fn
    grid = FloatGrid(kind, "channel")
    levels = grid.levels
    middles = (levels[1:] + levels[:-1]) / 2
    near = [np.nextafter(middles, np.float32(side)) for side in (-1e9, 1e9)]
    values = np.concatenate([levels, middles, *near, [-0.0, 1e-9, -1e-9, levels[-1] * 3]])
    values = values.astype(np.float32)[None]
    codes = grid.quantize(values, np.ones((1, 1), np.float32))
    clipped = np.clip(values, levels[0], levels[-1])
    assert np.array_equal(codes, clipped.astype(dtype).view(np.uint8))


@pytest.mark.parametrize("kind", ["E4M3", "E2M1"])
def test_ranks_are_places_in_the_levels(kind: Any) -> None:
    grid = FloatGrid(kind, "channel")
    ranks = np.arange(len(grid.levels), dtype=np.uint8)
    codes = grid.to_codes(ranks)
    values = grid.dequantize(GridCodes(codes[None], np.ones((1, 1), np.float32)))[0]
    assert np.array_equal(values, grid.levels)
    assert np.array_equal(grid.to_ranks(codes), ranks)


def test_blocks_may_be_cut_short() -> None:
    weights = draw(200, 300)
    coded = encode(GRIDS["FP8_BLOCK"], weights)
    assert coded.scales.shape == (200, 3)
    last = np.abs(weights[128:, 256:]).max() / np.float32(448)
    assert (coded.scales[128:, 2] == last).all()
    assert np.abs(decode(GRIDS["FP8_BLOCK"], coded) - weights).max() <= 16 * coded.scales.max()


@pytest.mark.parametrize("deviation", [0.02, 0.01])
def test_searched_scales_take_a_third_off_the_error(deviation: float) -> None:
    """Of GGUF's rule, which has no scale of the matrix; of compressed-tensors' rule a quarter."""
    weights = np.random.default_rng(1).normal(0, deviation, (256, 1024)).astype(np.float32)
    fmt = get_format("NVFP4")

    def error(found: NDArray[np.float32]) -> float:
        return float(((found - weights) ** 2).sum())

    blocks = error(native.decode(fmt, native.encode(fmt, weights)))
    grid = GRIDS["NVFP4A16"]
    naive, searched = (error(decode(grid, encode(grid, weights, s))) for s in ("minmax", "mse"))
    assert searched < 0.65 * blocks
    assert searched < 0.75 * naive


def test_importance_moves_the_scale() -> None:
    weights = draw()
    importance = np.random.default_rng(2).lognormal(0, 2, weights.shape[1]).astype(np.float32)
    grid = GRIDS["NVFP4A16"].bind(float(np.abs(weights).max()))
    errors = []
    for weighed in (None, importance):
        scales, _ = grid.fit(weights, weighed, "mse")
        found = grid.dequantize(GridCodes(grid.quantize(weights, scales), scales))
        errors.append(float((importance * (found - weights) ** 2).sum()))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("name", GRIDS)
def test_what_is_no_number_is_refused(name: str) -> None:
    weights = draw()
    weights[7, 9] = np.nan
    with pytest.raises(native.UnencodableError) as caught:
        encode(replace(GRIDS[name], whole=1.0), weights)
    assert (caught.value.row, caught.value.column) == (7, 9)
