"""Compact rows of base log-probabilities: the k largest, and what is left as one event.

The perplexities, Δp and the agreement on the top token are exact, since the true token's
log-probability is kept apart. The divergence becomes that of the k tokens and of the event "any
other": with T the base's mass outside the k,

    exact - compact = T * KL(base given other || model given other) >= 0

(the chain rule of relative entropy; here no floor cuts the vocabulary). The row also keeps
S = sum of p ln p over the other tokens, so that with m the model's lowest log-probability among
them exact <= top-k part + S - T * m, which is what `Comparison.ceiling` holds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.evals.scores import Comparison, Doubles, Floats, Ids, blocks, log_softmax, pick

MAGIC = b"_toplog_"


def row_type(kept: int) -> np.dtype[Any]:
    """A row's fields; tokens from the most likely on."""
    return np.dtype(
        [
            ("target", "<f4"),
            ("other", "<f4"),
            ("other_plogp", "<f4"),
            ("ids", "<u4", (kept,)),
            ("log_probs", "<f4", (kept,)),
        ]
    )


def encode(logits: Floats, targets: Ids, kept: int) -> NDArray[Any]:
    """Rows of logits (positions, vocabulary) whose true next tokens are ``targets``."""
    rows = np.zeros(len(logits), row_type(kept))
    for part in blocks(logits):
        # A stable sort, so that the first of equals leads, as argmax has it.
        ids = np.argsort(-logits[part], axis=1, kind="stable")[:, :kept]
        log_probs = log_softmax(logits[part])
        rows["target"][part] = pick(log_probs, targets[part])
        rows["ids"][part] = ids
        rows["log_probs"][part] = np.take_along_axis(log_probs, ids, axis=1)
        np.put_along_axis(log_probs, ids, -np.inf, axis=1)
        probs = np.exp(log_probs)
        rows["other"][part] = probs.sum(axis=1)
        rows["other_plogp"][part] = (probs * np.where(probs > 0, log_probs, 0)).sum(axis=1)
    return rows


class TopBase:
    """One window's rows, as a `quantcli.evals.scores.Base`."""

    def __init__(self, rows: NDArray[Any]) -> None:
        self._rows = rows

    def compare(self, logits: Floats, targets: Ids) -> tuple[Doubles, Comparison]:
        """See `quantcli.evals.scores.Base.compare`."""
        nll, divergence, ceiling, same = [], [], [], []
        for part in blocks(logits):
            rows, own = self._rows[part], log_softmax(logits[part])
            ids, base = rows["ids"].astype(np.int64), rows["log_probs"].astype(np.float64)
            nll.append(-pick(own, targets[part]))
            same.append(own.argmax(axis=1) == ids[:, 0])
            top = (np.exp(base) * (base - np.take_along_axis(own, ids, axis=1))).sum(axis=1)
            low = own.min(axis=1)
            np.put_along_axis(own, ids, -np.inf, axis=1)
            other = rows["other"].astype(np.float64)
            mine = np.exp(own).sum(axis=1)
            tiny = np.finfo(np.float64).tiny
            rest = other * np.log(np.maximum(other, tiny) / np.maximum(mine, tiny))
            divergence.append(top + rest)
            ceiling.append(np.maximum(top + rest, top + rows["other_plogp"] - other * low))
        return np.concatenate(nll), Comparison(
            -self._rows["target"].astype(np.float64),
            np.concatenate(divergence),
            np.concatenate(same),
            # Tokens stand from the likeliest on.
            np.exp(self._rows["log_probs"][:, 0].astype(np.float64)),
            np.concatenate(ceiling),
        )
