"""The integer grid: nearest codes, ranges that only get better, and MLX's own rule bit for bit."""

import ml_dtypes
import numpy as np
import pytest

from quantcli.formats.integer import (
    GridCodes,
    IntegerGrid,
    dequantize,
    encode,
    fit_ranges,
    fit_tensor,
    quantize,
)
from quantcli.formats.native import UnencodableError
from quantcli.layouts.mlx import pack_codes

ZEROS = ("middle", "integer", "edge")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    generator = np.random.default_rng(3)
    return (0.02 * generator.standard_t(5, (40, 256)) + 0.003).astype(np.float32)


def group_errors(rows: np.ndarray, coded: GridCodes, grid: IntegerGrid, weights=1.0):
    missed = (dequantize(coded, grid).astype(np.float64) - rows) ** 2 * weights
    return missed.reshape(len(rows), coded.scales.shape[1], -1).sum(-1)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_codes_are_the_nearest_for_scales_as_they_are_stored(rows, bits, zero, search):
    for dtype, kind in DTYPES.items():
        grid = IntegerGrid(bits, zero, "group", 32, dtype)
        coded = encode(rows, grid, search=search)
        assert np.array_equal(coded.scales, coded.scales.astype(kind).astype(np.float32))
        assert coded.codes.max() < 1 << bits
        missed = np.abs(dequantize(coded, grid) - rows)
        for step in (-1, 1):
            moved = np.clip(coded.codes.astype(int) + step, 0, grid.top).astype(np.uint8)
            other = GridCodes(moved, coded.scales, coded.zeros)
            assert (missed <= np.abs(dequantize(other, grid) - rows) * (1 + 1e-4) + 1e-7).all()


@pytest.mark.parametrize("zero", ZEROS)
def test_extremes_are_within_the_range(rows, zero):
    grid = IntegerGrid(4, zero, "group", 32, "F32")
    coded = encode(rows, grid)
    spread = np.repeat(np.abs(coded.scales), 32, axis=1)
    # MLX stretches the scale so that one code is zero, which may push the far end out by a step.
    allowed = {"middle": 0.5, "integer": 1.0, "edge": 1.0}[zero]
    assert (np.abs(dequantize(coded, grid) - rows) <= allowed * spread * (1 + 1e-5)).all()


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_searching_never_loses_to_the_extremes(rows, zero, strategy):
    grid = IntegerGrid(3, zero, strategy, 32 if strategy == "group" else None, "BF16")
    plain = group_errors(rows, encode(rows, grid), grid)
    searched = group_errors(rows, encode(rows, grid, search="mse"), grid)
    # The references' symmetric rule is none of the ranges tried, and better for a few groups.
    better = searched <= plain * (1 + 1e-5)
    assert better.mean() > 0.98 if zero == "middle" else better.all()
    assert searched.sum() < 0.92 * plain.sum()


def test_importance_lowers_the_error_that_it_weighs(rows):
    weights = np.exp(2 * np.random.default_rng(4).normal(size=256)).astype(np.float32)
    grid = IntegerGrid(3, "middle", "group", 32, "BF16")
    blind = group_errors(rows, encode(rows, grid, search="mse"), grid, weights).sum()
    aware = group_errors(rows, encode(rows, grid, weights, "mse"), grid, weights).sum()
    assert aware < 0.9 * blind


@pytest.mark.parametrize("zero", ZEROS)
def test_rows_do_not_depend_on_each_other(zero):
    rows = np.random.default_rng(6).normal(size=(700, 512)).astype(np.float32)
    grid = IntegerGrid(4, zero, "group", 128, "F16")
    whole = encode(rows, grid, search="mse")
    parts = [encode(rows[i : i + 32], grid, search="mse") for i in range(0, 700, 32)]
    assert np.array_equal(whole.codes, np.concatenate([part.codes for part in parts]))
    assert np.array_equal(whole.scales, np.concatenate([part.scales for part in parts]))


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_a_tensor_in_slabs_has_the_range_of_one_long_row(rows, zero, search):
    tensor = IntegerGrid(4, zero, "tensor", None, "BF16")
    scales, zeros = fit_tensor(
        lambda: (rows[i : i + 7] for i in range(0, 40, 7)), tensor, None, search
    )
    if search == "minmax":
        expected, expected_zeros = fit_ranges(rows.reshape(1, -1), tensor)
        assert np.array_equal(scales, expected)
        assert zeros is None if expected_zeros is None else np.array_equal(zeros, expected_zeros)
    coded = GridCodes(quantize(rows, scales, zeros, tensor), scales, zeros)
    assert coded.scales.shape == (1, 1)
    extremes = fit_tensor(lambda: [rows], tensor)
    other = GridCodes(quantize(rows, *extremes, tensor), *extremes)
    error, bound = (((dequantize(c, tensor) - rows) ** 2).sum() for c in (coded, other))
    assert error == bound if search == "minmax" else error < 0.8 * bound


def test_a_zero_point_of_nought_is_avoided_where_it_cannot_be_stored():
    rows = np.random.default_rng(7).uniform(0.5, 1.5, (8, 64)).astype(np.float32)
    grid = IntegerGrid(4, "integer", "group", 32, "F16", lowest_zero=1)
    for search in ("minmax", "mse"):
        coded = encode(rows, grid, search=search)
        assert coded.zeros.min() >= 1
        assert np.abs(dequantize(coded, grid) - rows).max() < 0.12


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_and_next_to_nothing(zero, dtype):
    grid = IntegerGrid(4, zero, "group", 32, dtype)
    assert not dequantize(encode(np.zeros((2, 64), np.float32), grid, search="mse"), grid).any()
    tiny = np.full((1, 32), 1e-9, np.float32)
    assert np.isfinite(dequantize(encode(tiny, grid, search="mse"), grid)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named(rows, bad):
    broken = rows.copy()
    broken[13, 77] = bad
    with pytest.raises(UnencodableError) as refused:
        encode(broken, IntegerGrid(4, "integer", "group", 32), search="mse")
    assert (refused.value.row, refused.value.column) == (13, 77)
    with pytest.raises(UnencodableError) as refused:
        fit_tensor(lambda: [broken[:10], broken[10:]], IntegerGrid(4, "middle", "tensor"))
    assert (refused.value.row, refused.value.column) == (13, 77)


def test_a_weight_too_large_for_its_scale_is_named(rows):
    broken = rows.copy()
    broken[5, 9] = 3e6
    with pytest.raises(UnencodableError, match=r"3000000.0 at row 5, column 9 overflows"):
        encode(broken, IntegerGrid(4, "middle", "group", 32, "F16"))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_edges_are_mlx_own(rows, bits, group):
    mlx = pytest.importorskip("mlx.core")
    coded = encode(rows, IntegerGrid(bits, "edge", "group", group, "F32"))
    words, scales, biases = mlx.quantize(mlx.array(rows), group_size=group, bits=bits)
    assert np.array_equal(np.array(scales), coded.scales)
    assert np.array_equal(np.array(biases), coded.zeros)
    assert np.array_equal(np.array(words), pack_codes(coded.codes, bits))
