"""Rows that a block encoder must get right: each kind of row and of importance, as tables."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from quantcli.formats import BlockFormat
from quantcli.formats.grids import has_grid

Rows = np.ndarray
Maker = Callable[[np.random.Generator, int, int], Rows]


def _normal(rng: np.random.Generator, n: int, k: int) -> Rows:
    return rng.standard_normal((n, k)).astype(np.float32)


def _spike(rng: np.random.Generator, n: int, k: int) -> Rows:
    rows = np.zeros((n, k), np.float32)
    rows[np.arange(n), rng.integers(0, k, n)] = np.float32(-3)
    return rows


def _zero_blocks(rng: np.random.Generator, n: int, k: int) -> Rows:
    rows = _normal(rng, n, k)
    rows[(rng.random((n, k // 32 + 1)) < 0.5).repeat(32, axis=1)[:, :k]] = 0
    return rows


def _any_bits(rng: np.random.Generator, n: int, k: int) -> Rows:
    """Any finite float32 at all."""
    bits = rng.integers(0, 1 << 32, (n, k), dtype=np.uint32)
    bits[bits & 0x7F800000 == 0x7F800000] ^= 0x40000000
    return bits.view(np.float32)


KINDS: dict[str, Maker] = {
    "random": lambda rng, n, k: _normal(rng, n, k) * np.float32(0.02),
    "heavy-tailed": lambda rng, n, k: rng.standard_t(2, (n, k)).astype(np.float32),
    "zeros": lambda rng, n, k: np.zeros((n, k), np.float32),
    "signed zeros": lambda rng, n, k: np.copysign(np.float32(0), _normal(rng, n, k)),
    "constant": lambda rng, n, k: np.full((n, k), 0.3, np.float32),
    "one spike": _spike,
    "few values": lambda rng, n, k: rng.choice(np.float32([-1, -0.5, -0.0, 0, 0.5, 1]), (n, k)),
    "zero blocks": _zero_blocks,
    "subnormal": lambda rng, n, k: _normal(rng, n, k) * np.float32(1e-40),
    "tiny": lambda rng, n, k: _normal(rng, n, k) * np.float32(1e-36),
    "near the zero threshold": lambda rng, n, k: _normal(rng, n, k) * np.float32(1e-15),
    "huge": lambda rng, n, k: _normal(rng, n, k) * np.float32(1e38 / 8),
    "negative": lambda rng, n, k: -np.abs(_normal(rng, n, k)),
    "positive": lambda rng, n, k: np.abs(_normal(rng, n, k)) + np.float32(1),
    "any bits": _any_bits,
}

IMPORTANCES: dict[str, Callable[[np.random.Generator, int], Rows] | None] = {
    "no importance": None,
    "spread": lambda rng, k: (rng.random(k) ** 3 * 10).astype(np.float32),
    "half zero": lambda rng, k: np.where(rng.random(k) < 0.5, 0, 1).astype(np.float32),
    "all zero": lambda rng, k: np.zeros(k, np.float32),
    "extreme": lambda rng, k: (10.0 ** rng.uniform(-25, 25, k)).astype(np.float32),
}


def make(kind: str, nrows: int, columns: int, seed: int = 7) -> Rows:
    """Rows of one kind, float32 of shape (nrows, columns)."""
    rng = np.random.default_rng([seed, nrows, columns, *kind.encode()])
    return KINDS[kind](rng, nrows, columns)


def survivable(fmt: BlockFormat, rows: Rows) -> Rows:
    """Rows that llama.cpp encodes in this format.

    Where a distance overflows float32, its codebook searches abort the process; so for these the
    magnitudes stop at a million, which is more than most blocks have a float16 scale for.
    """
    most = np.float32(1e6)
    return np.clip(rows, -most, most) if has_grid(fmt.name) else rows


def importance(kind: str, columns: int, seed: int = 7) -> Rows | None:
    """One importance per column, float32, or None."""
    maker = IMPORTANCES[kind]
    rng = np.random.default_rng([seed, columns, *kind.encode()])
    return None if maker is None else maker(rng, columns)


def needed(fmt: BlockFormat, columns: int) -> Rows | None:
    """Importance for a format that is not encoded without, else None."""
    return importance("spread", columns) if fmt.needs_importance else None
