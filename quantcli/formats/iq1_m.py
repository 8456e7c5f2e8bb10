"""IQ1_M: eight weights as one of 2048 points of -1, 0 and 1, and a shift; 1.75 bits per weight.

======  =====  ==========================================================================
offset  bytes  content (256 weights)
======  =====  ==========================================================================
0       32     points, the low eight bits, one for every eight weights
32      16     four bits for every eight weights: the point's three high bits, and whether the
               shift is down
48      8      four little-endian words: scales ``l`` of four blocks of 16, three bits each, and
               above them a quarter of ``d``, float16, lowest first
======  =====  ==========================================================================

A weight is ``(point + shift) * (2l + 1) * d`` with a shift of 1/8 or -1/8. ``d`` is fitted last,
to the points and the rounded scales. Mirrors ``quantize_row_iq1_m_impl``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.formats.base import BlockFormat, Bytes, Floats
from quantcli.formats.codebook import SUPER, largest, round_scales, search_weights
from quantcli.formats.grids import load_grid
from quantcli.formats.iq1_search import SHIFT, place, split_blocks, worth
from quantcli.formats.search import Codes, from_halves, halves, ordered_sum

NBYTES = 56
BLOCK = 16
PARTS = SUPER // BLOCK
_EMPTY = np.float32(1e-7)
_FUDGE = np.float32(1.1125)
"""On ``d``: makes up for what the rounding of the blocks' scales loses."""
_STEP_SHIFTS = 3 * np.arange(4)


def quantize(rows: Floats, importance: Floats | None) -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes)."""
    x = rows.reshape(-1, BLOCK)
    weights = search_weights(rows, importance, 2).reshape(-1, BLOCK)
    cut = split_blocks(x, weights, halves=True)
    cut = replace(cut, found=cut.found & ~(np.abs(x).max(axis=1) < _EMPTY))
    shift = np.where(cut.found, cut.shift, 0)
    down = np.stack([shift >> 1, shift & 1], axis=1) > 0
    grid = load_grid("IQ1_M")
    scale, points = place(x, weights, cut, down, grid)

    scales = scale.reshape(-1, PARTS)
    top = largest(scales)
    first = top / np.float32(15)
    steps = round_scales(scales, first, 7)
    with np.errstate(all="ignore"):
        q = worth(grid.levels[points], down[:, :, None]).reshape(-1, SUPER)
        q = q * (2 * steps + 1).astype(np.float32).repeat(BLOCK, axis=1)
        w = weights.reshape(-1, SUPER)
        sum_qx, sum_q2 = ordered_sum(w * q * x.reshape(-1, SUPER)), ordered_sum(w * q * q)
        d = np.where((sum_q2 > 0) & ~np.isnan(first), sum_qx / sum_q2, first)
    there = top[:, None] != 0
    half = np.where(there, halves(d * _FUDGE).view("<u2"), 0).astype("<u2").view(np.uint8)
    steps, shifts = np.where(there, steps, 0), np.where(there, down.reshape(len(d), -1), 0)
    return join(half, points.reshape(len(d), -1), steps, shifts).reshape(len(rows), -1)


def dequantize(packed: Bytes) -> Floats:
    """Weights, float32 of shape (n, columns)."""
    blocks = packed.reshape(-1, NBYTES)
    d, numbers, steps, down = split(blocks)
    points = load_grid("IQ1_M").points[numbers.reshape(-1, PARTS, 2)]
    shift = np.where(down, -SHIFT, SHIFT).reshape(-1, PARTS, 2)
    scales = d[:, None] * (2 * steps + 1).astype(np.float32)
    values: Floats = scales[:, :, None, None] * (points + shift[:, :, :, None])
    return values.reshape(len(packed), -1)


def split(blocks: Bytes) -> tuple[Floats, Codes, Codes, Codes]:
    """``d`` (n,), points (n, 32), scales ``l`` (n, 16) and whether points are shifted down."""
    words = _scale_words(blocks)
    d = _scale_bits(words).astype("<u2").view(np.uint8).reshape(-1, 2)
    steps = (words[:, :, None] >> _STEP_SHIFTS & 7).reshape(-1, PARTS)
    pairs = np.stack([blocks[:, 32:48] & 15, blocks[:, 32:48] >> 4], axis=2)
    nibbles = pairs.reshape(len(blocks), -1).astype(np.int32)
    points = blocks[:, :32] | (nibbles & 7) << 8
    return from_halves(d, 0)[:, 0], points, steps.astype(np.int32), nibbles >> 3


def join(
    d: Bytes, points: NDArray[np.integer], steps: NDArray[np.integer], down: NDArray[np.integer]
) -> Bytes:
    """The blocks of ``d``, float16 bytes, and the other three that `split` gives."""
    words = (steps.reshape(-1, 4, 4) << _STEP_SHIFTS).sum(axis=2) | _scale_quarters(d)
    nibbles = points >> 8 | down << 3
    parts = [
        (points & 255).astype(np.uint8),
        (nibbles[:, ::2] | nibbles[:, 1::2] << 4).astype(np.uint8),
        words.astype("<u2").view(np.uint8),
    ]
    return np.concatenate(parts, axis=1)


def read_halves(blocks: Bytes) -> NDArray[np.float16]:
    """``d`` of blocks (n, bytes), float16 of shape (n,)."""
    return _scale_bits(_scale_words(blocks)).astype("<u2").view("<f2")


def write_halves(blocks: Bytes, d: NDArray[np.float16]) -> None:
    """Put another ``d`` into blocks, in place."""
    words = _scale_words(blocks) & 0xFFF | _scale_quarters(d.astype("<f2").reshape(-1, 1))
    blocks[:, 48:] = words.astype("<u2").view(np.uint8)


def first_infinite(packed: Bytes) -> int:
    """Index of the first block, among flat bytes, whose ``d`` is infinite or NaN, or -1."""
    bits = _scale_bits(_scale_words(packed.reshape(-1, NBYTES)))
    found = np.flatnonzero(bits & 0x7C00 == 0x7C00)
    return int(found[0]) if len(found) else -1


def _scale_words(blocks: Bytes) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.ascontiguousarray(blocks[:, 48:]).view("<u2").astype(np.int64)


def _scale_quarters(d: NDArray[Any]) -> NDArray[np.int64]:
    """The four words' own bits of ``d``, a float16 or its bytes in each row."""
    half = d.view("<u2").astype(np.int64)
    return (half >> 4 * np.arange(4) & 15) << 12


def _scale_bits(
    words: np.ndarray[tuple[int, int], np.dtype[np.int64]],
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    bits: np.ndarray[tuple[int], np.dtype[np.int64]] = (words >> 12 << 4 * np.arange(4)).sum(axis=1)
    return bits


FORMAT = BlockFormat(
    "IQ1_M", 29, SUPER, NBYTES, quantize, dequantize,
    first_infinite=first_infinite, fallback="IQ4_NL",
)  # fmt: skip
