"""Rows made for the branches of the K-quants' searches: the kernels' bytes are llama.cpp's.

A lane mask stands for each branch, so every row mixes sub-blocks that take it with some that do
not. Importance makes some minimums leave the range of the weights, some sums overflow and some
sub-blocks count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from support import ggml

from quantcli import _native
from quantcli.formats import get_format

Rng = np.random.Generator
SHAPE = (19, 1280)


def _per(length: int, low: float, high: float) -> Callable[[Rng], np.ndarray]:
    """Every run of ``length`` weights has a magnitude of its own: 10**low to 10**high."""

    def make(rng: Rng) -> np.ndarray:
        scale = 10.0 ** rng.uniform(low, high, (SHAPE[0], SHAPE[1] // length))
        return rng.standard_normal(SHAPE) * scale.repeat(length, axis=1)

    return make


def _sparse(rng: Rng) -> np.ndarray:
    return np.where(rng.random(SHAPE) < 0.05, rng.standard_normal(SHAPE), 0)


def _outliers(rng: Rng) -> np.ndarray:
    return rng.standard_normal(SHAPE) * np.where(rng.random(SHAPE) < 0.02, 1e4, 0.01)


def _overflows(rng: Rng) -> np.ndarray:
    """Some weights so large that products of two or three of them are infinite."""
    return rng.standard_normal(SHAPE) * np.where(rng.random(SHAPE) < 0.01, 1e25, 1)


ROWS: dict[str, Callable[[Rng], np.ndarray]] = {
    "sub-blocks of 16 whose scales round to zero": _per(16, -9, 0),
    "sub-blocks of 32 whose scales round to zero": _per(32, -9, 0),
    "sub-blocks of subnormals": _per(32, -45, -36),
    "every magnitude": _per(1, -38, 38),
    "many magnitudes": _per(1, -8, 4),
    "mostly zero": _sparse,
    "outliers": _outliers,
    "overflowing sums": _overflows,
    "far from zero": lambda rng: 5 - 1e-3 * rng.standard_normal(SHAPE),
    "at the precision of float32": lambda rng: -5 - 1e-6 * rng.standard_normal(SHAPE),
    "ties": lambda rng: np.round(rng.standard_normal(SHAPE) * 4) / 4,
    "ramp": lambda rng: np.linspace(-1, 1, SHAPE[1]) * rng.uniform(-1, 1, (SHAPE[0], 1)),
}
IMPORTANCE: dict[str, Callable[[Rng], np.ndarray] | None] = {
    "none": None,
    "over eight orders": lambda rng: np.exp(3 * rng.standard_normal(SHAPE[1])),
    "mostly zero": lambda rng: np.where(rng.random(SHAPE[1]) < 0.8, 0, rng.random(SHAPE[1])),
    "half zero": lambda rng: np.where(rng.random(SHAPE[1]) < 0.5, 0, rng.random(SHAPE[1])),
    "zero sub-blocks": lambda rng: (rng.random(SHAPE[1] // 16) < 0.6).repeat(16).astype(float),
    "subnormal": lambda rng: rng.random(SHAPE[1]) * 1e-42,
    "overflowing": lambda rng: rng.random(SHAPE[1]) * 1e36,
}


@pytest.mark.parametrize("weighing", IMPORTANCE)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_every_branch_gives_llama_cpps_bytes(name: str, kind: str, weighing: str, isa: str) -> None:
    fmt, rng = get_format(name), np.random.default_rng([3, *kind.encode(), *weighing.encode()])
    x = ROWS[kind](rng).astype(np.float32)
    maker = IMPORTANCE[weighing]
    importance = None if maker is None else maker(rng).astype(np.float32)
    got = np.zeros((len(x), fmt.row_bytes(x.shape[1])), np.uint8)
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    assert _native.encode(fmt.type_id, 0, flat, *x.shape, got.reshape(-1), importance) == -1
    np.testing.assert_array_equal(got, ggml.quantize(fmt.type_id, x, importance))
