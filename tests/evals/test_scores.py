"""The numbers of a position and their summary, against the formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quantcli.evals import scores
from quantcli.evals.scores import FLOOR, Comparison, LogitsBase, log_softmax, losses
from quantcli.evals.summary import QUANTILES, Tally


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(5)


def _p(row: np.ndarray) -> list[float]:
    whole = math.fsum(math.exp(x) for x in row.tolist())
    return [math.exp(x) / whole for x in row.tolist()]


def test_losses_are_those_of_the_softmax(random: np.random.Generator) -> None:
    logits = random.normal(0, 3, (5, 11)).astype(np.float32)
    targets = np.array([0, 3, 10, 2, 2])
    wanted = [-math.log(_p(row)[t]) for row, t in zip(logits, targets, strict=True)]
    np.testing.assert_allclose(losses(logits, targets), wanted, rtol=1e-12)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, 1e4 - 1, -1e4]], np.float32)
    wanted = [-math.log1p(math.exp(-1)), -1 - math.log1p(math.exp(-1))]
    np.testing.assert_allclose(log_softmax(logits)[0, :2], wanted, rtol=1e-9)


def test_the_divergence_is_the_sum_over_the_vocabulary(random: np.random.Generator) -> None:
    base = random.normal(0, 2, (4, 9)).astype(np.float32)
    own = base + random.normal(0, 0.5, base.shape).astype(np.float32)
    targets = np.array([1, 2, 3, 4])
    nll, found = LogitsBase(base).compare(own, targets)
    for row in range(4):
        p, q = _p(base[row]), _p(own[row])
        wanted = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found.divergence[row] == pytest.approx(wanted, rel=1e-9)
        assert found.base_nll[row] == pytest.approx(-math.log(p[targets[row]]), rel=1e-9)
        assert nll[row] == pytest.approx(-math.log(q[targets[row]]), rel=1e-9)
        assert found.same_top[row] == (np.argmax(p) == np.argmax(q))


def test_a_model_does_not_diverge_from_itself(random: np.random.Generator) -> None:
    logits = random.normal(0, 3, (4, 9)).astype(np.float32)
    _, found = LogitsBase(logits).compare(logits, np.zeros(4, np.int64))
    assert np.abs(found.divergence).max() < 1e-12
    assert found.same_top.all()


def test_tokens_below_the_floor_do_not_count() -> None:
    base = np.array([[0.0, FLOOR - 1, FLOOR + 1]], np.float32)
    own = np.array([[0.0, 5.0, FLOOR + 2]], np.float32)
    p, q = log_softmax(base)[0], log_softmax(own)[0]
    wanted = sum(math.exp(p[i]) * (p[i] - q[i]) for i in (0, 2))
    _, found = LogitsBase(base).compare(own, np.array([0]))
    assert found.divergence[0] == pytest.approx(wanted, rel=1e-12)


def test_rows_may_be_worked_on_in_blocks(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random.normal(0, 2, (7, 9)).astype(np.float32)
    own, targets = base[::-1].copy(), np.arange(7)
    whole = LogitsBase(base).compare(own, targets)
    monkeypatch.setattr(scores, "_BLOCK", 20)
    parts = LogitsBase(base).compare(own, targets)
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_array_equal(whole[1].divergence, parts[1].divergence)
    np.testing.assert_array_equal(whole[1].same_top, parts[1].same_top)


def test_the_summary_is_that_of_the_formulas(random: np.random.Generator) -> None:
    base = random.normal(0, 2, (60, 9)).astype(np.float32)
    own = base + random.normal(0, 0.5, base.shape).astype(np.float32)
    targets = random.integers(0, 9, 60)
    tally = Tally()
    for part in (slice(0, 25), slice(25, 60)):
        tally.add(*LogitsBase(base[part]).compare(own[part], targets[part]))
    found = tally.summary()
    a, b = losses(own, targets), losses(base, targets)
    n = len(a)
    assert found.positions == n
    assert found.perplexity.value == pytest.approx(math.exp(a.mean()))
    error = a.std(ddof=1) / math.sqrt(n)
    # llama.cpp divides the population's variance by n - 1: the same.
    assert found.perplexity.error == pytest.approx(found.perplexity.value * error)
    against = found.against
    assert against is not None
    assert against.base_perplexity.value == pytest.approx(math.exp(b.mean()))
    assert against.correlation == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert against.log_ratio.value == pytest.approx((a - b).mean())
    # The error of a mean difference is that of the differences.
    assert against.log_ratio.error == pytest.approx((a - b).std(ddof=1) / math.sqrt(n))
    assert against.ratio.value == pytest.approx(math.exp((a - b).mean()))
    assert against.difference.value == pytest.approx(math.exp(a.mean()) - math.exp(b.mean()))
    change = np.exp(-a) - np.exp(-b)
    assert against.p_mean.value == pytest.approx(change.mean())
    assert against.p_rms.value == pytest.approx(math.sqrt((change**2).mean()))
    assert list(against.quantiles) == list(QUANTILES)
    divergence = LogitsBase(base).compare(own, targets)[1].divergence
    assert against.quantiles[0.5] == pytest.approx(np.median(divergence))
    assert against.quantiles[1.0] == pytest.approx(divergence.max())
    share = against.same_top.value
    assert against.same_top.error == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)))


def test_bands_are_those_of_the_bases_largest_probability(random: np.random.Generator) -> None:
    # Rows from nearly even to nearly certain, 9 tokens: none can be below 1/9.
    base = random.normal(0, 1, (400, 9)) * random.uniform(0, 6, (400, 1))
    base = base.astype(np.float32)
    own = base + random.normal(0, 0.7, base.shape).astype(np.float32)
    tally = Tally()
    for part in (slice(0, 130), slice(130, 400)):
        targets = np.zeros(part.stop - part.start, np.int64)
        tally.add(*LogitsBase(base[part]).compare(own[part], targets))
    against = tally.summary().against
    assert against is not None
    p, q = (np.array([_p(row) for row in logits]) for logits in (base, own))
    sure, divergence = p.max(axis=1), (p * np.log(p / q)).sum(axis=1)
    same = p.argmax(axis=1) == q.argmax(axis=1)
    empty, *filled = against.by_confidence
    assert (empty.positions, empty.share, empty.mean, empty.same_top) == (0, 0, None, None)
    for band, low, high in zip(filled, (0.1, 0.5, 0.9), (0.5, 0.9, 1.01), strict=True):
        here = (sure >= low) & (sure < high)
        n = here.sum()
        assert n > 20
        assert (band.positions, band.share) == (n, n / 400)
        assert band.mean is not None
        assert band.same_top is not None
        assert band.mean.value == pytest.approx(divergence[here].mean(), rel=1e-4)
        error = divergence[here].std(ddof=1) / math.sqrt(n)
        assert band.mean.error == pytest.approx(error, rel=1e-4)
        share = same[here].mean()
        assert band.same_top.value == share
        assert band.same_top.error == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)))
    whole = sum(band.share * band.mean.value for band in filled if band.mean)
    assert whole == pytest.approx(against.mean.value)


@pytest.mark.parametrize(("top", "band"), [(0.1, 1), (0.5, 2), (0.9, 3), (0.0999, 0), (0.8999, 2)])
def test_a_lower_end_belongs_to_its_band(top: float, band: int) -> None:
    one = np.array([1.0])
    tally = Tally()
    tally.add(one, Comparison(one, one, np.array([True]), np.array([top])))
    against = tally.summary().against
    assert against is not None
    assert [found.positions for found in against.by_confidence] == [
        int(i == band) for i in range(4)
    ]


def test_one_position_has_no_error() -> None:
    tally = Tally()
    tally.add(np.array([2.0]))
    assert tally.summary().perplexity.error == 0


def test_a_hopeless_model_stays_finite() -> None:
    tally = Tally()
    tally.add(np.array([1e4, 2e4]))
    assert math.isfinite(tally.summary().perplexity.value)
