"""What the positions of a text amount to: means, quantiles and their standard errors.

Errors are standard errors of the mean over positions; those of differences and ratios use the
covariance of the two models' losses, which is large, since both read the same text.
Source: llama.cpp's tools/perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from quantcli.evals.scores import Comparison, Doubles

QUANTILES = (1.0, 0.999, 0.99, 0.95, 0.90, 0.75, 0.50, 0.25, 0.10, 0.05, 0.01, 0.001, 0.0)
"""Fractions of the positions, of which the divergence and Δp are reported."""


CONFIDENCE = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Ends of the bands of the base's largest probability; the lower end belongs to a band."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class ConfidenceBand:
    """The positions at which the base gives its preferred token a probability in one band.

    ``mean`` is the KL divergence in nats, ``same_top`` the share of these positions at which both
    prefer the same token; None where there is no such position.
    """

    low: float
    high: float
    positions: int
    share: float
    mean: Estimate | None
    same_top: Estimate | None


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a model is from its base. Quantiles go by fraction; probabilities are not percent."""

    base_perplexity: Estimate
    correlation: float
    """Of the two models' losses."""
    log_ratio: Estimate
    """ln(perplexity / base perplexity)."""
    ratio: Estimate
    difference: Estimate
    mean: Estimate
    """KL divergence of the base from the model, in nats."""
    quantiles: dict[float, float]
    same_top: Estimate
    """Share of positions at which both prefer the same token."""
    p_mean: Estimate
    """Change of the true token's probability."""
    p_rms: Estimate
    p_quantiles: dict[float, float]
    ceiling: float | None = None
    """The mean divergence is at most this, where the base is known in part only."""
    by_confidence: tuple[ConfidenceBand, ...] = ()
    """From where the base is least sure on."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A model on a text: positions scored, perplexity and, with a base, the divergence from it."""

    positions: int
    perplexity: Estimate
    against: Divergence | None = None


@dataclass
class Tally:
    """Collects positions window by window; a few numbers for each, never its logits."""

    nll: list[Doubles] = field(default_factory=list)
    compared: list[Comparison] = field(default_factory=list)

    def add(self, nll: Doubles, comparison: Comparison | None = None) -> None:
        """Add one window's positions."""
        self.nll.append(nll)
        if comparison is not None:
            self.compared.append(comparison)

    def summary(self) -> Summary:
        """What the positions so far amount to."""
        nll = np.concatenate(self.nll)
        against = _against(nll, _join(self.compared)) if self.compared else None
        return Summary(len(nll), _exp(mean_of(nll)), against)


def join_tallies(parts: Sequence[Tally]) -> Tally:
    """What several collected of every so many windows, in the order of the windows."""
    found = Tally()
    for number in range(max(len(part.nll) for part in parts)):
        for part in parts:
            if number < len(part.nll):
                compared = part.compared[number] if part.compared else None
                found.add(part.nll[number], compared)
    return found


def _join(parts: list[Comparison]) -> Comparison:
    ceilings = [part.ceiling for part in parts if part.ceiling is not None]
    return Comparison(
        np.concatenate([part.base_nll for part in parts]),
        np.concatenate([part.divergence for part in parts]),
        np.concatenate([part.same_top for part in parts]),
        np.concatenate([part.base_top for part in parts]),
        np.concatenate(ceilings) if ceilings else None,
    )


def mean_of(values: NDArray[np.floating]) -> Estimate:
    """The mean and its standard error, 0 for a single value."""
    count = len(values)
    error = math.sqrt(float(values.var()) / (count - 1)) if count > 1 else 0.0
    return Estimate(float(values.mean()), error)


def _share(hits: NDArray[np.bool_]) -> Estimate:
    share = float(hits.mean())
    return Estimate(share, math.sqrt(share * (1 - share) / max(1, len(hits) - 1)))


def _by_confidence(compared: Comparison) -> tuple[ConfidenceBand, ...]:
    # What rounding lifts above 1 belongs to the last band.
    band = np.digitize(compared.base_top, CONFIDENCE[1:-1])
    found = []
    for number, (low, high) in enumerate(pairwise(CONFIDENCE)):
        here = band == number
        count = int(here.sum())
        mean = mean_of(compared.divergence[here]) if count else None
        same = _share(compared.same_top[here]) if count else None
        found.append(ConfidenceBand(low, high, count, count / len(band), mean, same))
    return tuple(found)


def _exp(log: Estimate) -> Estimate:
    # A hopeless model's loss may lie beyond the largest double.
    value = math.exp(min(log.value, 600.0))
    return Estimate(value, value * log.error)


def _quantiles(values: Doubles) -> dict[float, float]:
    return dict(zip(QUANTILES, map(float, np.quantile(values, QUANTILES)), strict=True))


def _apart(a: float, b: float, covariance: float) -> float:
    """The error of a difference of two estimates with these errors."""
    return math.sqrt(max(0.0, a * a + b * b - 2 * covariance))


def _against(nll: Doubles, compared: Comparison) -> Divergence:
    base, count = compared.base_nll, len(nll)
    own, other = mean_of(nll), mean_of(base)
    # Covariance of the two means.
    shared = float(((nll - own.value) * (base - other.value)).mean()) / max(1, count - 1)
    both = own.error * other.error
    log_ratio = Estimate(own.value - other.value, _apart(own.error, other.error, shared))
    ppl, base_ppl = _exp(own), _exp(other)
    difference = Estimate(
        ppl.value - base_ppl.value,
        _apart(ppl.error, base_ppl.error, ppl.value * base_ppl.value * shared),
    )
    change = np.exp(-nll) - np.exp(-base)
    squares = mean_of(change**2)
    rms = math.sqrt(squares.value)
    return Divergence(
        base_perplexity=base_ppl,
        correlation=shared / both if both else 1.0,
        log_ratio=log_ratio,
        ratio=_exp(log_ratio),
        difference=difference,
        mean=mean_of(compared.divergence),
        quantiles=_quantiles(compared.divergence),
        same_top=_share(compared.same_top),
        p_mean=mean_of(change),
        p_rms=Estimate(rms, 0.5 / rms * squares.error if rms else 0.0),
        p_quantiles=_quantiles(change),
        ceiling=None if compared.ceiling is None else float(compared.ceiling.mean()),
        by_confidence=_by_confidence(compared),
    )
