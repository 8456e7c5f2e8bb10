"""How many tokens each weight saw, what follows where they were few, and outlier channels.

An expert of which the text says little must not be judged by a handful of tokens. The file keeps
its raw sums and its true count; where quantcli reads it, an expert below `ENOUGH_TOKENS` gets the
mixture of its mean and that of all experts of its layer, and an unseen one the latter alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantcli.sources.imatrix import ENOUGH_TOKENS, shrink
from quantcli.statistics.importance_file import Calibration

ACTIVE = 1e-5
"""A channel is active when its mean square is larger, as llama-imatrix counts them."""
OUTLIER = 36.0
"""A channel stands out when its mean square is this many times the median: six times as large."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens that a tensor saw; for a stack, over its matrices."""

    tensor: str
    matrices: int
    unseen: int
    few: int
    least: int
    median: int
    most: int

    @property
    def policy(self) -> str:
        """What is done about it."""
        if self.matrices == 1:
            return "its own mean" if self.least else "no weights"
        if self.unseen == self.matrices:
            return "no weights"
        return f"{self.few} drawn to the layer's mean" if self.few else "their own means"


@dataclass(frozen=True, slots=True)
class TensorStats:
    """What llama-imatrix's --show-statistics is about: figures on the mean squares of a tensor.

    ``total`` is their sum, ``entropy`` in bits and as a share of the largest possible one,
    ``outliers`` the number of channels over `OUTLIER` medians and ``channel`` the largest one;
    ``cosine`` compares with the same tensor of the layer before (None in the first).
    """

    tensor: str
    total: float
    active: float
    entropy: float
    entropy_share: float
    outliers: int
    channel: int
    cosine: float | None


def count_tokens(calibration: Calibration) -> list[TokenCounts]:
    """One line a tensor, in the file's order."""
    found = []
    for name, counts in sorted(calibration.counts.items()):
        few = int((counts < ENOUGH_TOKENS).sum()) if len(counts) > 1 else 0
        unseen = int((counts == 0).sum())
        found.append(
            TokenCounts(
                name, len(counts), unseen, few,
                int(counts.min()), int(np.median(counts)), int(counts.max()),
            )
        )  # fmt: skip
    return found


def tensor_stats(calibration: Calibration) -> list[TensorStats]:
    """Figures of every tensor that saw anything, in the file's order."""
    means = {
        name: shrink(
            squares.astype(np.float32), calibration.counts[name].astype(np.float32), ENOUGH_TOKENS
        ).astype(np.float64)
        for name, squares in sorted(calibration.squares.items())
        if calibration.counts[name].any()
    }
    return [_describe(name, values, means) for name, values in means.items()]


def _describe(
    name: str, means: NDArray[np.float64], others: Mapping[str, NDArray[np.float64]]
) -> TensorStats:
    flat = means.reshape(-1)
    total = float(flat.sum())
    shares = flat[flat > 0] / total if total > 0 else np.zeros(0)
    entropy = float(-(shares * np.log2(shares)).sum())
    channels = means.mean(axis=0)
    median = float(np.median(channels))
    return TensorStats(
        name,
        total,
        float((flat > ACTIVE).mean()),
        entropy,
        entropy / np.log2(flat.size) if flat.size > 1 else 1.0,
        int((channels > OUTLIER * median).sum()) if median > 0 else 0,
        int(channels.argmax()),
        _cosine(name, flat, others),
    )


def _cosine(
    name: str, flat: NDArray[np.float64], others: Mapping[str, NDArray[np.float64]]
) -> float | None:
    layer = re.match(r"blk\.(\d+)\.", name)
    before = others.get(f"blk.{int(layer[1]) - 1}.{name[layer.end() :]}") if layer else None
    if before is None or before.size != flat.size:
        return None
    length = float(np.linalg.norm(flat) * np.linalg.norm(before))
    return float(flat @ before.reshape(-1)) / length if length > 0 else None
