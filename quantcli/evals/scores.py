"""The numbers of one position: loss, divergence from the base, agreement.

llama-perplexity's definitions. Logarithms are natural; sums over the vocabulary run in float64,
some rows at a time, so that beside the logits themselves little memory is taken. The divergence
counts the tokens to which the base gives a log-probability above `FLOOR`, as llama.cpp's
tools/perplexity does, since its files of base logits end there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]

FLOOR = -16.0
"""Base log-probabilities below it are left out of the divergence."""

HELD = 1 << 24
"""Logits of one model that are held at a time: 64 MB."""

_BLOCK = 1 << 20
"""Values whose float64 logarithms are held at a time."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Per position: the base's loss, the divergence in nats, and whether both prefer one token.

    ``base_top`` is the base's probability of the token that it prefers. ``ceiling`` bounds the
    divergence from above where it is known from below only.
    """

    base_nll: Doubles
    divergence: Doubles
    same_top: NDArray[np.bool_]
    base_top: Doubles
    ceiling: Doubles | None = None


class Base(Protocol):
    """What a base model says about one window's scored positions."""

    def compare(self, logits: Floats, targets: Ids) -> tuple[Doubles, Comparison]:
        """A model's losses, and its comparison with the base; logits (positions, vocabulary)."""


def log_softmax(logits: Floats) -> Doubles:
    """Log-probabilities of logits of shape (positions, vocabulary)."""
    shifted = _shifted(logits)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def losses(logits: Floats, targets: Ids) -> Doubles:
    """Negative log-likelihood of each position's true next token."""
    parts = [pick(log_softmax(logits[rows]), targets[rows]) for rows in blocks(logits)]
    return -np.concatenate(parts)


def pick(log_probs: Doubles, targets: Ids) -> Doubles:
    """The log-probability of each position's true next token."""
    found: Doubles = np.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0]
    return found


def blocks(logits: Floats) -> Iterator[slice]:
    """Slices of rows that are worked on together."""
    step = max(1, _BLOCK // logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def row_blocks(positions: int, vocabulary: int) -> list[slice]:
    """Slices of a window's scored positions whose logits are held at the same time."""
    step = max(1, HELD // vocabulary)
    return [slice(start, min(start + step, positions)) for start in range(0, positions, step)]


class LogitsBase:
    """A base whose logits (or log-probabilities up to a constant) are at hand."""

    def __init__(self, logits: Floats) -> None:
        self._logits = logits
        self._log_sums = np.concatenate(
            [np.log(np.exp(_shifted(logits[rows])).sum(axis=1)) for rows in blocks(logits)]
        ) + logits.max(axis=1)

    def compare(self, logits: Floats, targets: Ids) -> tuple[Doubles, Comparison]:
        """See `Base.compare`."""
        return compare_rows(
            lambda rows: self._logits[rows] - self._log_sums[rows, None], logits, targets
        )


class _Rows(Protocol):
    def __call__(self, rows: slice, /) -> Doubles: ...


def compare_rows(base: _Rows, logits: Floats, targets: Ids) -> tuple[Doubles, Comparison]:
    """Hold logits against log-probabilities of the base, which ``base`` gives for some rows."""
    nll, base_nll, divergence, same, sure = [], [], [], [], []
    for rows in blocks(logits):
        own, other = log_softmax(logits[rows]), base(rows)
        nll.append(-pick(own, targets[rows]))
        base_nll.append(-pick(other, targets[rows]))
        top = other.argmax(axis=1)
        same.append(own.argmax(axis=1) == top)
        sure.append(np.exp(pick(other, top)))
        divergence.append(diverge(other, own))
    return np.concatenate(nll), Comparison(
        np.concatenate(base_nll),
        np.concatenate(divergence),
        np.concatenate(same),
        np.concatenate(sure),
    )


def diverge(base: Doubles, own: Doubles) -> Doubles:
    """Kullback-Leibler divergence per row, of tokens above `FLOOR` in the base."""
    weights = np.where(base > FLOOR, np.exp(base), 0.0)
    weights *= base - own
    sums: Doubles = weights.sum(axis=1)
    return sums


def _shifted(logits: Floats) -> Doubles:
    wide: Doubles = logits.astype(np.float64)
    wide -= logits.max(axis=1, keepdims=True)
    return wide
