"""Error feedback on integer grids, against a textbook GPTQ and the losses that it promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.schur import remaining

from quantcli.formats.integer import GridCodes, IntegerGrid, dequantize
from quantcli.rounding.codecs import GridCodec
from quantcli.rounding.column_blocks import cut_column_blocks
from quantcli.rounding.grid_feedback import find_ranges, round_on_grid
from quantcli.rounding.options import Options
from quantcli.statistics.hessian import output_error, prepare_hessian
from quantcli.workers import Workers, workers

pytestmark = pytest.mark.slow

POOL = Workers()

GRIDS = {
    "middle g128": IntegerGrid(4, "middle", "group", 128),
    "integer g64": IntegerGrid(3, "integer", "group", 64, "F16"),
    "integer g64 without zero": IntegerGrid(4, "integer", "group", 64, "F16", lowest_zero=1),
    "edge g32": IntegerGrid(4, "edge", "group", 32, "F32"),
    "edge g64": IntegerGrid(2, "edge", "group", 64),
    "middle g24": IntegerGrid(4, "middle", "group", 24),
    "middle g8": IntegerGrid(2, "middle", "group", 8),
    "integer g200": IntegerGrid(4, "integer", "group", 200),
    "integer g300": IntegerGrid(4, "integer", "group", 300),
    "middle channel": IntegerGrid(8, "middle", "channel"),
    "integer channel": IntegerGrid(4, "integer", "channel"),
    "middle tensor": IntegerGrid(4, "middle", "tensor"),
    "integer tensor": IntegerGrid(4, "integer", "tensor"),
}


def _problem(columns: int, rows: int = 48, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Heavy-tailed weights, and the mean of x x^T of correlated inputs with two loud channels."""
    draw = np.random.default_rng(seed)
    inputs = draw.standard_normal((4 * columns, columns // 4)) @ draw.standard_normal(
        (columns // 4, columns)
    )
    inputs += 0.3 * draw.standard_normal(inputs.shape)
    inputs[:, :2] *= 8
    weights = (draw.standard_t(5, (rows, columns)) * 0.03).astype(np.float32)
    return weights, (inputs.T @ inputs / len(inputs)).astype(np.float32)


def _columns(grid: IntegerGrid) -> int:
    size = grid.group_size or 100
    return size * -(-384 // size)


def _textbook(
    weights: np.ndarray, hessian: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: int
) -> np.ndarray:
    """GPTQ as its paper has it: the inverse Hessian, column by column, in float64."""
    work = weights.astype(np.float64)
    inverse = np.linalg.inv(hessian.astype(np.float64))
    codes = np.zeros(weights.shape, np.int64)
    for j in range(weights.shape[1]):
        codes[:, j] = np.clip(np.rint(work[:, j] / scale) + zero, 0, top)
        error = (work[:, j] - (codes[:, j] - zero) * scale) / inverse[j, j]
        work -= error[:, None] * inverse[j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("name", ["middle channel", "integer channel"])
@pytest.mark.parametrize("columns", [96, 300])
def test_it_is_the_textbook_s_gptq_on_a_grid_per_channel(
    columns: int, name: str, order: str
) -> None:
    grid = GRIDS[name]
    weights, mean = _problem(columns, rows=16)
    hessian = prepare_hessian(mean, order=order)
    chosen = np.arange(columns) if hessian.order is None else hessian.order
    found = round_on_grid(weights, grid, hessian, None, POOL, Options(sweeps=0, block_sweeps=0))
    scale = found.scales[:, 0].astype(np.float64)
    zero = np.full(16, grid.middle) if found.zeros is None else found.zeros[:, 0]
    want = _textbook(
        weights[:, chosen], hessian.matrix[np.ix_(chosen, chosen)], scale, zero, grid.top
    )
    # A value half way between two codes may fall to either side in float32.
    differing = np.flatnonzero((found.codes[:, chosen] != want).any(axis=1))
    assert len(differing) <= (2 if grid.bits == 8 else 0)


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("name", GRIDS)
def test_feedback_beats_rounding_and_sweeps_never_raise_the_loss(name: str, order: str) -> None:
    grid = GRIDS[name]
    weights, mean = _problem(_columns(grid))
    hessian = prepare_hessian(mean, order=order)
    importance = np.ascontiguousarray(mean.diagonal())
    codec = GridCodec(grid, name)
    plain = output_error(weights - codec.decode(codec.encode(weights, importance, POOL)), mean)
    losses = []
    for sweeps in range(3):
        found = round_on_grid(weights, grid, hessian, importance, POOL, Options(sweeps=sweeps))
        assert found.codes.max() <= grid.top
        values = dequantize(found, grid)
        losses.append(output_error(weights - values, hessian.matrix))
        # Packed for the store and back, nothing changes.
        np.testing.assert_array_equal(codec.decode(codec.pack(found)), values)
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert output_error(weights - values, mean) < 0.9 * plain
    if grid.strategy == "tensor":
        assert len(np.unique(found.scales)) == 1
    if grid.zero == "integer":
        assert found.zeros is not None
        assert found.zeros.min() >= grid.lowest_zero
    if grid.scale_dtype == "F16":
        np.testing.assert_array_equal(found.scales.astype(np.float16), found.scales)


@pytest.mark.parametrize("name", ["middle g128", "edge g32", "integer g64", "integer channel"])
def test_sweeps_before_later_columns_lower_what_those_cannot_make_good(name: str) -> None:
    grid = GRIDS[name]
    weights, mean = _problem(512)
    hessian = prepare_hessian(mean)
    remains = remaining(hessian.matrix, 256)
    lost, whole = [], []
    for block_sweeps in range(3):
        options = Options(sweeps=0, block_sweeps=block_sweeps)
        found = round_on_grid(weights, grid, hessian, None, POOL, options)
        errors = weights - dequantize(found, grid)
        lost.append(output_error(errors[:, :256], remains))
        whole.append(output_error(errors, hessian.matrix))
    assert lost[2] <= lost[1] < lost[0]
    assert whole[2] < whole[0]


@pytest.mark.parametrize("name", ["middle g128", "edge g32", "integer g64", "middle tensor"])
def test_scales_of_a_sweep_are_at_an_optimum(name: str) -> None:
    """No scale, nor edge, can be bettered alone by the next value of its dtype or by more."""
    grid = GRIDS[name]
    weights, mean = _problem(384, rows=16)
    hessian = prepare_hessian(mean)
    found = round_on_grid(weights, grid, hessian, None, POOL, Options(sweeps=25))
    start = _row_losses(weights - dequantize(found, grid), hessian.matrix)
    for factor in (0.99, 1.01):
        for group in range(found.scales.shape[1]):
            scales = found.scales.copy()
            scales[:, group] *= np.float32(factor)
            other = dequantize(GridCodes(found.codes, scales, found.zeros), grid)
            after = _row_losses(weights - other, hessian.matrix)
            if grid.strategy == "tensor":
                assert after.sum() >= start.sum()
            else:
                assert (after >= start * (1 - 1e-4)).all()


def _row_losses(errors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.einsum("ij,jk,ik->i", errors, matrix, errors, dtype=np.float64)


def test_codes_do_not_depend_on_threads() -> None:
    grid = GRIDS["edge g32"]
    weights, mean = _problem(256, rows=70)
    hessian = prepare_hessian(mean)
    packed = []
    for count in (1, 3):
        with workers(count) as pool:
            found = round_on_grid(weights, grid, hessian, None, pool, Options())
        packed.append(GridCodec(grid, "").pack(found))
    np.testing.assert_array_equal(*packed)


@pytest.mark.parametrize(("columns", "group"), [(384, 128), (96, 8), (480, 24), (900, 300), (7, 7)])
def test_panels_hold_every_column_once(columns: int, group: int) -> None:
    blocks = cut_column_blocks(columns, group)
    seen = np.concatenate([np.arange(columns)[block.columns] for block in blocks])
    np.testing.assert_array_equal(seen, np.arange(columns))
    for block in blocks:
        assert block.width <= 256
        assert block.width % 32 == 0
        assert len(np.unique(block.places)) == block.columns.stop - block.columns.start
        own = np.arange(columns)[block.columns] // group - block.groups.start
        np.testing.assert_array_equal(block.owners[block.places // 16], own)


def test_ranges_of_one_row_do_not_depend_on_the_others() -> None:
    weights, _ = _problem(256)
    for name in ("middle g128", "edge g32", "integer channel"):
        whole = find_ranges(weights, GRIDS[name], None, POOL)
        alone = find_ranges(weights[5:6], GRIDS[name], None, POOL)
        np.testing.assert_array_equal(whole[0][5:6], alone[0])
