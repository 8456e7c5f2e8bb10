"""Losses of wide matrices that are estimated, against the trace that defines them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="products are torch's")

from quantcli.formats import get_format
from quantcli.layerwise.steady import use_threads
from quantcli.rounding.codecs import BlockCodec
from quantcli.rounding.gptq import GPTQ
from quantcli.rounding.options import Options
from quantcli.rounding.tensor import round_matrix
from quantcli.statistics import matrix_statistics
from quantcli.statistics.hessian import prepare_hessian
from quantcli.statistics.losses import Loss
from quantcli.statistics.matrix_statistics import MatrixStatistics
from quantcli.statistics.output_fisher import OutputFisher, cut_strips
from quantcli.statistics.sketched_loss import LossSketch, SketchingJudge
from quantcli.workers import Workers

ROWS, COLUMNS = 200, 512


def _mean(size: int, power: float, seed: int, loud: float = 1.0) -> np.ndarray:
    """x x^T over inputs of which a few channels are loud, with a mean and a decaying spectrum."""
    draw = np.random.default_rng(seed)
    mixed = draw.standard_normal((size, size)) * np.arange(1, size + 1)[:, None] ** -power
    values = draw.standard_normal((3 * size, size)) @ mixed
    values += 0.5 * values.std() * draw.standard_normal(size)
    values[:, :3] *= loud
    return (values.T @ values / len(values)).astype(np.float32)


def _errors(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and what they lose on a grid."""
    weights = np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    return weights, weights - np.round(weights * 4) / 4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("power", "loud"), [(0.0, 1.0), (0.5, 30.0), (1.0, 100.0)])
def test_estimates_are_near_the_trace(
    power: float, loud: float, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean = _mean(COLUMNS, power, 1, loud)
    cuts = [slice(0, 80), slice(80, ROWS)] if tied else []
    strips = [(cut, _mean(cut.stop - cut.start, power, 2)) for cut in cuts]
    fisher = np.eye(ROWS)
    for cut, own in strips:
        fisher[cut, cut] = own
    judge = SketchingJudge(
        LossSketch(mean, prepare_hessian(mean)), cuts or [slice(0, 90), slice(90, ROWS)],
        [own for _, own in strips] or None,
    )  # fmt: skip
    weights, lost = _errors(3)
    # As error feedback leaves them: large where the mean is small.
    damped = mean + 1e-2 * mean.diagonal().mean() * np.eye(COLUMNS)
    fed = lost @ np.linalg.inv(np.linalg.cholesky(damped))
    several = [weights, lost, fed.astype(np.float32)]
    found = judge.settle([judge.take(errors.__getitem__) for errors in several])
    for loss, errors in zip(found, several, strict=True):
        wide = errors.astype(np.float64)
        exact = np.einsum("ij,ij->", fisher @ wide @ mean, wide)
        assert abs(loss.value - exact) < 5 * loss.error + 1e-4 * exact
        assert loss.error < 0.015 * exact
        assert loss.value == pytest.approx(exact, rel=0.03)
        assert judge.cost(errors.__getitem__) == pytest.approx(exact, rel=1e-4)
    assert found[1].is_apart(found[0])


def test_estimates_do_not_depend_on_the_threads() -> None:
    mean, (_, lost) = _mean(COLUMNS, 0.5, 1), _errors(3)
    fisher, found = _mean(ROWS, 0.5, 2), []
    for threads in (1, 2, 3):
        use_threads(threads)
        judge = SketchingJudge(LossSketch(mean, prepare_hessian(mean)), [slice(0, ROWS)], [fisher])
        found.append(judge.settle([judge.take(lost.__getitem__)])[0])
    use_threads(1)
    for other in found[1:]:
        assert found[0].exact == other.exact
        np.testing.assert_array_equal(found[0].probes, other.probes)


def test_the_order_of_losses_that_differ_alike_in_all_probes_is_known() -> None:
    probes = np.array([1.0, 5.0, 9.0, 2.0])
    assert Loss(1.0, probes).is_apart(Loss(1.0, probes * 1.01 + 0.5))
    assert not Loss(1.0, probes).is_apart(Loss(1.0, probes[::-1] * 1.1))
    assert Loss(1.0).is_apart(Loss(1.0))
    # A mean of 4.25, give or take 1.8.
    assert not Loss(80.0, probes).is_close
    assert Loss(90.0, probes).is_close


class _Near:
    """Rounds a little less or more than the weights to nearest."""

    name, options, needs = "near", (), ("importance",)

    def fits(self, codec: BlockCodec) -> bool:
        return True

    def round(self, codec, rows, statistics, options, pool):  # type: ignore[no-untyped-def]
        rows = rows * np.linspace(0.9995, 1.0005, len(rows), dtype=np.float32)[:, None]
        return codec.encode(rows, statistics.importance, pool)


def test_a_result_is_chosen_by_estimates_only_where_they_suffice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mean, outputs = _mean(COLUMNS, 0.5, 1), OutputFisher(ROWS, (_mean(ROWS, 0.5, 2),))
    known = MatrixStatistics(prepare_hessian(mean), mean, mean, None, outputs)
    assert [*cut_strips(ROWS)] == [slice(0, ROWS)]
    weights, codec = _errors(4)[0], BlockCodec(get_format("Q4_K"))

    def cost(packed: np.ndarray) -> float:
        return known.cost(weights - codec.decode(packed), outputs)

    exact = round_matrix(GPTQ, codec, weights, known, Options(), Workers())
    monkeypatch.setattr(matrix_statistics, "WIDE", 256)
    found = round_matrix(GPTQ, codec, weights, known, Options(), Workers())
    np.testing.assert_array_equal(found.packed, exact.packed)
    assert found.before == pytest.approx(exact.before, rel=0.02)
    assert found.after == pytest.approx(exact.after, rel=0.02)
    assert found.after != exact.after
    near = round_matrix(_Near(), codec, weights, known, Options(), Workers())  # type: ignore[arg-type]
    plain = codec.encode(weights, known.importance, Workers())
    other = _Near().round(codec, weights, known, Options(), Workers())
    better = other if cost(other) <= cost(plain) else plain
    np.testing.assert_array_equal(near.packed, better)
    assert near.before / near.after == pytest.approx(cost(plain) / cost(better), rel=1e-9)
