"""Wide Hessians in panels, losses by panels and shared products, against their definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="products are torch's")

import torch

from quantcli.artifacts.scratch import create_array
from quantcli.errors import SourceError
from quantcli.layerwise.products import add_gram, mirror, product
from quantcli.layerwise.steady import use_threads
from quantcli.statistics.hessian import prepare_hessian
from quantcli.statistics.panel_hessian import prepare_panels
from quantcli.statistics.quadratic_loss import quadratic_loss
from quantcli.statistics.symmetric_mean import SymmetricMean

COLUMNS = 600


def _mean(size: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    mixed = draw.standard_normal((2 * size, size)) @ draw.standard_normal((size, size))
    return mixed.T @ mixed / (2 * size * size)


def test_panels_hold_the_damped_matrix_and_its_factor() -> None:
    mean = _mean(COLUMNS, 0)
    mean[:, 7] = mean[7] = 0
    found = prepare_panels(lambda rows: mean[rows].astype(np.float32), COLUMNS, 0.05)
    average = mean.diagonal().mean()
    damped = mean + np.diag(0.05 * average + np.where(np.arange(COLUMNS) == 7, average, 0))
    np.testing.assert_allclose(found.matrix, damped, rtol=1e-5, atol=1e-5)
    factor = found.factor.astype(np.float64)
    assert np.array_equal(np.tril(factor, -1), np.zeros_like(factor))
    np.testing.assert_array_equal(factor.diagonal(), 1)
    again = factor * found.pivots @ factor.T
    np.testing.assert_allclose(again, damped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [None, "natural", "activation"])
def test_roots(order: str | None) -> None:
    """Of panels (None), and of whole Hessians in both orders."""
    mean, draw = _mean(COLUMNS, 1), np.random.default_rng(2)
    found = (
        prepare_panels(lambda rows: mean[rows].astype(np.float32), COLUMNS, 0.05)
        if order is None
        else prepare_hessian(mean, 0.05, order)
    )
    root = found.spread(np.eye(COLUMNS, dtype=np.float32)).astype(np.float64)
    np.testing.assert_allclose(root @ root.T, found.matrix, rtol=1e-4, atol=1e-4)
    values = draw.standard_normal((COLUMNS, 5)).astype(np.float32)
    np.testing.assert_allclose(root.T @ found.gather(values), values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [slice(0, 256), slice(100, 300), slice(512, 600)], ids=str)
def test_columns_across_panels(columns: slice) -> None:
    mean = _mean(COLUMNS, 1)
    found = prepare_panels(lambda rows: mean[rows].astype(np.float32), COLUMNS, 0.05)
    errors = np.random.default_rng(2).standard_normal((40, COLUMNS)).astype(np.float32)
    matrix, factor = found.matrix.astype(np.float64), found.factor.astype(np.float64)
    first = columns.start
    np.testing.assert_allclose(
        found.slope(errors, columns), errors @ matrix[:, columns], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        found.ahead(errors, columns), errors[:, :first] @ factor[:first, columns],
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    np.testing.assert_array_equal(found.own(columns), found.matrix[columns, columns])
    np.testing.assert_array_equal(found.part(columns).factor, found.factor[columns, columns])


def test_slopes_follow_the_errors() -> None:
    mean = _mean(COLUMNS, 10)
    found = prepare_panels(lambda rows: mean[rows].astype(np.float32), COLUMNS, 0.05)
    matrix, draw = found.matrix.astype(np.float64), np.random.default_rng(11)
    errors = draw.standard_normal((20, COLUMNS)).astype(np.float32)
    slopes, now = found.follow(errors.copy()), errors.astype(np.float64)
    for start in range(0, COLUMNS, 256):
        columns = slice(start, min(start + 256, COLUMNS))
        np.testing.assert_allclose(slopes.of(columns), now @ matrix[:, columns], atol=1e-4)
        change = draw.standard_normal((20, columns.stop - start)).astype(np.float32)
        now[:, columns] += change
        slopes.change(columns, change)


def test_damping_is_raised_from_the_matrix_as_it_was() -> None:
    mean = _mean(COLUMNS, 3)
    values, vectors = np.linalg.eigh(mean)
    values[0] = -0.2 * mean.diagonal().mean()
    mean = (vectors * values) @ vectors.T
    found = prepare_panels(lambda rows: mean[rows].astype(np.float32), COLUMNS, 0.05)
    assert found.damping == pytest.approx(0.5)
    damped = mean + 0.5 * mean.diagonal().mean() * np.eye(COLUMNS)
    np.testing.assert_allclose(found.matrix, damped, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        (found.factor * found.pivots) @ found.factor.T, damped, rtol=1e-3, atol=1e-4
    )


def test_what_no_damping_mends_is_refused() -> None:
    broken = np.eye(COLUMNS) - 1e3 * (np.ones((COLUMNS, COLUMNS)) - np.eye(COLUMNS))
    with pytest.raises(SourceError, match="not positive definite"):
        prepare_panels(lambda rows: broken[rows].astype(np.float32), COLUMNS, 0.05)
    broken[5, 5] = np.nan
    with pytest.raises(SourceError, match="not finite"):
        prepare_panels(lambda rows: broken[rows].astype(np.float32), COLUMNS, 0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_of_pairs_of_columns_is_that_of_all(tied: bool) -> None:
    errors = np.random.default_rng(4).standard_normal((900, COLUMNS)).astype(np.float32)
    mean = _mean(COLUMNS, 5).astype(np.float32)
    strips = [(slice(0, 400), _mean(400, 6).astype(np.float32))]
    strips += [(slice(400, 900), _mean(500, 7).astype(np.float32))]
    fisher = np.eye(900)
    for strip, own in strips if tied else ():
        fisher[strip, strip] = own
    wanted = np.trace(fisher @ errors.astype(np.float64) @ mean @ errors.T)
    assert quadratic_loss(errors, mean, strips if tied else None) == pytest.approx(wanted, rel=1e-5)


def test_a_mean_in_a_file_is_that_of_its_sum(tmp_path: Path) -> None:
    total = create_array(tmp_path / "sum", np.float64, (3, 3))
    total[:] = [[4, 2, 0], [2, 8, 6], [0, 6, 10]]
    mean = SymmetricMean(total, 2, 0.5, np.diag([1.0, 2.0, 3.0]))
    wanted = [[3, 0.5, 0], [0.5, 6, 1.5], [0, 1.5, 8]]
    np.testing.assert_array_equal(np.asarray(mean), wanted)
    np.testing.assert_array_equal(mean.rows(slice(1, 3)), wanted[1:])
    np.testing.assert_array_equal(mean.diagonal(), [3, 6, 8])


def test_products_do_not_depend_on_the_threads() -> None:
    draw = np.random.default_rng(8)
    a, b = (draw.standard_normal(s).astype(np.float32) for s in ((700, 300), (300, 1100)))
    found, sums = [], []
    for threads in (1, 2, 3):
        use_threads(threads)
        found.append(product(a, b))
        into = np.zeros((1200, 1200))
        add_gram(into, torch.from_numpy(np.tile(b, (1, 2))[:, :1100]), slice(50, 1150))
        mirror(into)
        sums.append(into)
    use_threads(1)
    np.testing.assert_allclose(found[0], a.astype(np.float64) @ b, rtol=1e-4, atol=1e-4)
    want = b.astype(np.float64).T @ b
    np.testing.assert_allclose(sums[0][50:1150, 50:1150], want, rtol=1e-4, atol=1e-4)
    assert not sums[0][:50].any()
    np.testing.assert_array_equal(sums[0], sums[0].T)
    for other, total in zip(found[1:], sums[1:], strict=True):
        np.testing.assert_array_equal(found[0], other)
        np.testing.assert_array_equal(sums[0], total)
