"""Feedback and descent where groups of weights are points of a codebook, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from quantcli import _native
from quantcli.formats import get_format, native
from quantcli.formats.codebook_lattice import CODEBOOKS, SIGNS_SHIFT, CodebookLattice
from quantcli.formats.grids import load_grid
from quantcli.rounding.block_feedback import round_with_feedback
from quantcli.rounding.descent import sweep
from quantcli.rounding.encoded_columns import encode_columns
from quantcli.rounding.vector_codebook import VectorCodebook
from quantcli.statistics.hessian import HessianBlock, output_error, prepare_hessian
from quantcli.workers import Workers, workers

POOL = Workers()


def _problem(columns: int, rows: int = 48) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Heavy-tailed weights, and the mean of x x^T of correlated inputs with two loud channels."""
    draw = np.random.default_rng(3)
    mixing = draw.standard_normal((columns // 4, columns))
    inputs = draw.standard_normal((4 * columns, columns // 4)) @ mixing
    inputs += 0.3 * draw.standard_normal(inputs.shape)
    inputs[:, :2] *= 8
    weights = (draw.standard_t(5, (rows, columns)) * 0.03).astype(np.float32)
    mean = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    return weights, mean, np.ascontiguousarray(mean.diagonal())


def _loss(packed: np.ndarray, name: str, weights: np.ndarray, mean: np.ndarray) -> float:
    return output_error(weights - native.decode(get_format(name), packed), mean)


def _signs(lattice: CodebookLattice) -> np.ndarray:
    """Every choice of signs for eight weights that a format allows."""
    if lattice.shift:
        return np.ones((1, 8))
    signs = np.array(list(itertools.product((1, -1), repeat=8)), np.float64)
    return signs[signs.prod(axis=1) > 0] if lattice.even_signs else signs


def _points(lattice: CodebookLattice) -> np.ndarray:
    """The points as decoders have them: IQ1's grid shifted both ways by an eighth."""
    grid = load_grid(lattice.grid).points.astype(np.float64) * lattice.unit
    if not lattice.grid.startswith("IQ1"):
        return grid
    return np.concatenate([grid + 0.125, grid - 0.125])


def _least(lattice: CodebookLattice, target: np.ndarray, weigh: np.ndarray) -> np.ndarray:
    """The least weighted square distance of each row of eight weights from points with signs."""
    points = _points(lattice)
    best = np.full(len(target), np.inf)
    for signs in _signs(lattice):
        total = np.zeros(len(target))
        for start in range(0, 8, lattice.group):
            part = slice(start, start + lattice.group)
            apart = target[:, None, part] - signs[part] * points
            total += (apart * apart @ weigh[part]).min(axis=1)
        best = np.minimum(best, total)
    return best


def _least_of(points: np.ndarray, target: np.ndarray, weigh: np.ndarray) -> np.ndarray:
    """The least weighted square distance of each row of eight weights from points."""
    apart = target[:, None] - points
    least: np.ndarray = (apart * apart @ weigh).min(axis=1)
    return least


@pytest.mark.parametrize("name", CODEBOOKS)
def test_without_correlations_every_group_is_the_nearest_point_with_signs(name: str) -> None:
    lattice = CODEBOOKS[name]
    draw = np.random.default_rng(11)
    weights = draw.standard_normal((20, 16)).astype(np.float32)
    weigh = draw.uniform(0.2, 3, 16).astype(np.float32)
    step = np.full((20, 1), 2 / lattice.points.max(), np.float32)
    codes, errors = VectorCodebook.of(lattice).feed_back(
        16, weights, weights, HessianBlock(np.eye(16, dtype=np.float32), weigh), step,
        np.zeros_like(step), POOL,
    )  # fmt: skip
    values = step[:, :, None] * lattice.levels(codes)
    np.testing.assert_allclose(errors, weights - values.reshape(20, 16), atol=1e-6)
    found = (errors.astype(np.float64) ** 2 * weigh).reshape(20, 2, 8).sum(axis=2)
    eights = (slice(0, 8), slice(8, 16))
    if lattice.shared_shift:
        both = [
            sum(_least_of(points, weights[:, e] / step, weigh[e]) for e in eights)
            for points in np.split(_points(lattice), 2)
        ]
        want = np.minimum(*both) * step[:, 0] ** 2
        np.testing.assert_allclose(found.sum(axis=1), want, rtol=1e-4)
        return
    for half, part in enumerate(eights):
        want = _least(lattice, weights[:, part] / step, weigh[part]) * step[:, 0] ** 2
        np.testing.assert_allclose(found[:, half], want, rtol=1e-4)


def _parity(lattice: CodebookLattice, codes: np.ndarray) -> np.ndarray:
    """The number of minus signs in each eight weights."""
    minus = codes[..., None] >> (SIGNS_SHIFT + np.arange(lattice.group)) & 1
    return minus.reshape(len(codes), -1, 8).sum(axis=2)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_feedback_beats_the_encoder_and_sweeps_never_raise_the_loss(name: str) -> None:
    fmt = get_format(name)
    weights, mean, importance = _problem(512)
    hessian = prepare_hessian(mean)
    plain = _loss(encode_columns(fmt, weights, importance, POOL), name, weights, mean)
    coded = round_with_feedback(fmt, weights, hessian, importance, POOL)
    losses = [output_error(coded.errors, hessian.matrix)]
    for _ in range(3):
        sweep(coded, hessian)
        losses.append(output_error(coded.errors, hessian.matrix))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.85 * losses[0]
    assert _loss(coded.pack(), name, weights, mean) < 0.15 * plain
    # What is stored is what was counted.
    np.testing.assert_array_equal(weights - native.decode(fmt, coded.pack()), coded.errors)
    if CODEBOOKS[name].shared_shift:
        down = np.concatenate([coded.parts(i).codes for i in (0, 1)]).reshape(-1, 4) // 2048
        assert (down == down[:, :1]).all()
        assert 0.2 < down.mean() < 0.8
    if CODEBOOKS[name].even_signs:
        assert not any((_parity(CODEBOOKS[name], coded.parts(i).codes) % 2).any() for i in (0, 1))


@pytest.mark.parametrize("name", CODEBOOKS)
def test_order_by_activation_leaves_groups_whole(name: str) -> None:
    fmt = get_format(name)
    weights, mean, importance = _problem(512)
    hessian = prepare_hessian(mean, order="activation")
    together = VectorCodebook.of(CODEBOOKS[name]).together
    assert together in (4, 8, 32)
    units = hessian.keep_together(together)
    assert units.order is not None
    np.testing.assert_array_equal(units.order[::together] % together, 0)
    last = together - 1
    np.testing.assert_array_equal(units.order[last::together], units.order[::together] + last)
    plain = _loss(encode_columns(fmt, weights, importance, POOL), name, weights, mean)
    coded = round_with_feedback(fmt, weights, hessian, importance, POOL)
    assert _loss(coded.pack(), name, weights, mean) < 0.4 * plain


@pytest.mark.parametrize("name", CODEBOOKS)
def test_codes_do_not_depend_on_threads_or_instruction_set(name: str) -> None:
    fmt = get_format(name)
    weights, mean, importance = _problem(256, rows=70)
    hessian = prepare_hessian(mean)
    active, packed = _native.isa(), []
    try:
        for isa in _native.available():
            _native.select(isa)
            for count in (1, 3):
                with workers(count) as pool:
                    coded = round_with_feedback(fmt, weights, hessian, importance, pool)
                    sweep(coded, hessian)
                packed.append(coded.pack())
    finally:
        _native.select(active)
    for other in packed[1:]:
        np.testing.assert_array_equal(other, packed[0])


def test_a_sub_block_without_a_scale_keeps_its_codes() -> None:
    fmt = get_format("IQ3_S")
    weights, mean, importance = _problem(256)
    weights[::2] = 0
    hessian = prepare_hessian(mean)
    coded = round_with_feedback(fmt, weights, hessian, importance, POOL)
    sweep(coded, hessian)
    assert np.isfinite(coded.errors).all()
    np.testing.assert_array_equal(coded.errors[::2], 0)


def test_the_metric_of_a_unit_is_the_hessian_s_where_nothing_comes_after() -> None:
    _, mean, _ = _problem(64)
    hessian = prepare_hessian(mean)
    metric = hessian.part(slice(0, 64)).metric(8)
    np.testing.assert_allclose(metric[-8:], hessian.matrix[-8:, -8:], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sub": 12}, "runs of 12"),
        ({"first": np.zeros((2, 3), np.float32)}, "halves of 3"),
        ({"patterns": np.full((5, 2), 9, np.uint8)}, "point 0 has a half"),
        ({"metric": np.ones((64, 8), np.float32)}, "metric has shape"),
        ({"codes": np.zeros((4, 64), np.int32)}, "codes has shape"),
        ({"apart": 0.25}, "5 points with free signs have no two halves apart"),
    ],
)
def test_the_binding_refuses_what_does_not_fit(change: dict[str, object], message: str) -> None:
    given = {
        "first": np.ones((2, 2), np.float32), "second": np.ones((2, 2), np.float32),
        "patterns": np.zeros((5, 2), np.uint8), "signs": "free", "apart": 0.0,
        "sub": 32, "spread": 0, "most": 31,
        "target": np.zeros((4, 64), np.float32), "weights": np.zeros((4, 64), np.float32),
        "factor": np.eye(64, dtype=np.float32), "metric": np.ones((64, 4), np.float32),
        "norms": np.ones((16, 5), np.float32), "d": np.ones(4, np.float32),
        "scales": np.ones((4, 2), np.float32),
        "codes": np.zeros((4, 16), np.int32), "errors": np.zeros((4, 64), np.float32),
    }  # fmt: skip
    _native.feedback_points(**given)
    with pytest.raises(ValueError, match=message):
        _native.feedback_points(**(given | change))


def test_the_binding_refuses_codes_that_are_no_points() -> None:
    grid = (np.ones((2, 2), np.float32), np.ones((2, 2), np.float32), np.zeros((5, 2), np.uint8))
    hessian, norms = np.eye(256, dtype=np.float32), np.ones((64, 5), np.float32)
    gradient, scales = np.zeros((1, 256), np.float32), np.ones((1, 8), np.float32)
    codes = np.full((1, 64), 5, np.int32)
    with pytest.raises(ValueError, match="code 5 is no point"):
        _native.sweep_points(
            *grid, "free", 0.0, 32, 256, (1, 31), hessian, norms, gradient, True, codes,
            np.ones((1, 1), np.float32), scales,
        )  # fmt: skip
