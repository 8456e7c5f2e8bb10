"""Block formats with codebook grids taken apart: scales, and a grid point with signs per group.

Of the formats in `CODEBOOKS` four or eight weights at a time are one point of a grid with signs, or
a point that has its signs in itself. Every weight is

    d * scale * sign * level

where ``scale`` is odd: twice the four (IQ1: three) stored bits and one more, and the levels hold
whatever else a decoder multiplies by. A code is the number of a group's point, and above
`SIGNS_SHIFT` a bit for each minus sign, the first weight's lowest. IQ1 has no signs, but a shift of
all levels of a point up or down: its points are the grid's shifted up, and behind them the grid's
shifted down. Splitting reads what a decoder
reads, so a sub-block of zeros in an IQ3_S that ggml wrote, which has moved the low bits of the
later ones, is split as it is decoded; joining what was split gives the same bytes.

Where `even_signs` holds, codes with an odd number of minus signs among eight weights have no bytes;
where `shared_shift` does, points under one scale that are shifted both ways have none.

Source: the layouts in the formats' own files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantcli.formats import iq1_m, iq1_s
from quantcli.formats.base import Bytes, Floats
from quantcli.formats.codebook import SUPER, all_signs
from quantcli.formats.grids import load_grid
from quantcli.formats.iq1_search import SHIFT
from quantcli.formats.lattice import Parts
from quantcli.formats.search import Codes, from_halves, halves

SIGNS_SHIFT = 16
"""Bits of a code below the signs."""

_SEVENS = 7 * np.arange(4, dtype=np.uint32)
_PAIRS = 2 * np.arange(4)


@dataclass(frozen=True, slots=True)
class CodebookLattice:
    """How a format's blocks of 256 divide: ``sub`` weights share a scale, ``group`` a point.

    ``unit`` is what a level of the grid counts for: a power of two. ``scale_range`` holds odd ends,
    between which the scales are odd too. With a ``shift`` there are no signs; a ``shared_shift`` is
    that of all points under one scale.
    """

    grid: str
    sub: int
    group: int
    unit: float
    even_signs: bool
    split: Callable[[Bytes], Parts]
    join: Callable[[Parts], Bytes]
    scale_range: tuple[int, int] = (1, 31)
    block: int = SUPER
    shift: float = 0.0
    shared_shift: bool = False

    @property
    def points(self) -> Floats:
        """The values of the points without signs, float32 of shape (points, group)."""
        points: Floats = load_grid(self.grid).points * np.float32(self.unit)
        if self.shift:
            shift = np.float32(self.shift)
            return np.concatenate([points + shift, points - shift])
        return points

    @property
    def signs(self) -> str:
        """Whether groups have signs of their own: ``none``, ``free``, or ``even`` many minuses."""
        if self.shift:
            return "none"
        return "even" if self.even_signs else "free"

    @property
    def apart(self) -> float:
        """From the first half of the points to the second, if a run is out of one half; or 0."""
        return -2 * self.shift if self.shared_shift else 0.0

    def levels(self, codes: Codes) -> Floats:
        """The values of groups under a scale of one, float32; a last axis of ``group`` is added."""
        points = self.points[codes & ((1 << SIGNS_SHIFT) - 1)]
        minus = codes[..., None] >> (SIGNS_SHIFT + np.arange(self.group)) & 1
        levels: Floats = np.where(minus, -points, points)
        return levels

    def values(self, parts: Parts) -> Floats:
        """The weights, float32 of shape (n, block)."""
        step, _ = self.steps(parts)
        subs = self.levels(parts.codes).reshape(len(parts.codes), -1, self.sub)
        return (step[:, :, None] * subs).reshape(len(parts.codes), -1)

    def steps(self, parts: Parts) -> tuple[Floats, Floats]:
        """``d * scale``, and a minimum of zero, each of shape (n, subs), float32."""
        step: Floats = parts.d[:, None] * parts.scales.astype(np.float32)
        return step, np.zeros_like(step)


def _signed(points: NDArray[np.integer], signs: Bytes, group: int) -> Codes:
    """Codes (n, groups) of point numbers and a byte of signs for every eight weights."""
    if group == 4:
        signs = np.stack([signs & 15, signs >> 4], axis=2).reshape(points.shape)
    return points.astype(np.int32) | signs.astype(np.int32) << SIGNS_SHIFT


def _sign_bytes(codes: Codes, group: int) -> Bytes:
    """The signs of codes (n, groups), a byte for every eight weights."""
    signs: Bytes = (codes >> SIGNS_SHIFT).astype(np.uint8)
    if group == 4:
        signs = signs[:, 0::2] | signs[:, 1::2] << np.uint8(4)
    return signs


def _low(codes: Codes) -> Bytes:
    return (codes & 255).astype(np.uint8)


def _split_nibbles(packed: Bytes) -> Codes:
    """Scales (n, 2k) of k bytes with two steps each, the first one low."""
    steps = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
    return 2 * steps.astype(np.int32) + 1


def _join_nibbles(scales: Codes) -> Bytes:
    steps: Bytes = (scales >> 1).astype(np.uint8)
    packed: Bytes = steps[:, 0::2] | steps[:, 1::2] << np.uint8(4)
    return packed


def _split_words(words: NDArray[np.uint32]) -> tuple[Bytes, Codes]:
    """Sign bytes (n, 4k) and scales (n, k) of words with four times seven signs and a step."""
    signs = all_signs(words[:, :, None] >> _SEVENS).reshape(len(words), -1)
    return signs, 2 * (words >> 28).astype(np.int32) + 1


def _join_words(signs: Bytes, scales: Codes) -> Bytes:
    """The bytes of such words, (n, 4k)."""
    sevens = (signs & 127).astype(np.uint32).reshape(len(signs), -1, 4) << _SEVENS
    words = sevens.sum(axis=2, dtype=np.uint32) | (scales >> 1).astype(np.uint32) << 28
    packed: Bytes = words.astype("<u4").view(np.uint8)
    return packed


def _words(packed: Bytes, kind: str) -> NDArray[np.uint32]:
    words: NDArray[np.uint32] = np.ascontiguousarray(packed).view(kind).astype(np.uint32)
    return words


def _split_iq2_xxs(blocks: Bytes) -> Parts:
    coded = blocks[:, 2:].reshape(len(blocks), 8, 8)
    signs, scales = _split_words(_words(coded[:, :, 4:].reshape(len(blocks), -1), "<u4"))
    points = coded[:, :, :4].reshape(len(blocks), -1)
    return Parts(from_halves(blocks, 0)[:, 0], scales, _signed(points, signs, 8))


def _join_iq2_xxs(parts: Parts) -> Bytes:
    words = _join_words(_sign_bytes(parts.codes, 8), parts.scales).reshape(-1, 8, 4)
    coded = np.concatenate([_low(parts.codes).reshape(-1, 8, 4), words], axis=2)
    return np.concatenate([halves(parts.d), coded.reshape(len(coded), -1)], axis=1)


def _split_iq2_xs(blocks: Bytes) -> Parts:
    words = _words(blocks[:, 2:66], "<u2")
    codes = _signed(words & 511, all_signs(words >> 9), 8)
    return Parts(from_halves(blocks, 0)[:, 0], _split_nibbles(blocks[:, 66:]), codes)


def _join_iq2_xs(parts: Parts) -> Bytes:
    signs = _sign_bytes(parts.codes, 8).astype(np.int32) & 127
    words = (parts.codes & 511 | signs << 9).astype("<u2").view(np.uint8)
    return np.concatenate([halves(parts.d), words, _join_nibbles(parts.scales)], axis=1)


def _split_iq2_s(blocks: Bytes) -> Parts:
    high = (blocks[:, 66:74, None].astype(np.int32) >> _PAIRS & 3).reshape(len(blocks), -1)
    codes = _signed(blocks[:, 2:34] | high << 8, blocks[:, 34:66], 8)
    return Parts(from_halves(blocks, 0)[:, 0], _split_nibbles(blocks[:, 74:]), codes)


def _join_iq2_s(parts: Parts) -> Bytes:
    high = (parts.codes >> 8 & 3).reshape(len(parts.codes), -1, 4) << _PAIRS
    fields = [
        halves(parts.d), _low(parts.codes), _sign_bytes(parts.codes, 8),
        high.sum(axis=2).astype(np.uint8), _join_nibbles(parts.scales),
    ]  # fmt: skip
    return np.concatenate(fields, axis=1)


def _split_iq3_xxs(blocks: Bytes) -> Parts:
    signs, scales = _split_words(_words(blocks[:, 66:], "<u4"))
    return Parts(from_halves(blocks, 0)[:, 0], scales, _signed(blocks[:, 2:66], signs, 4))


def _join_iq3_xxs(parts: Parts) -> Bytes:
    words = _join_words(_sign_bytes(parts.codes, 4), parts.scales)
    return np.concatenate([halves(parts.d), _low(parts.codes), words], axis=1)


def _split_iq3_s(blocks: Bytes) -> Parts:
    ninth = np.unpackbits(np.ascontiguousarray(blocks[:, 66:74]), axis=1, bitorder="little")
    codes = _signed(blocks[:, 2:66] | ninth.astype(np.int32) << 8, blocks[:, 74:106], 4)
    return Parts(from_halves(blocks, 0)[:, 0], _split_nibbles(blocks[:, 106:]), codes)


def _join_iq3_s(parts: Parts) -> Bytes:
    ninth = np.packbits((parts.codes >> 8 & 1).astype(np.uint8), axis=1, bitorder="little")
    fields = [
        halves(parts.d), _low(parts.codes), ninth, _sign_bytes(parts.codes, 4),
        _join_nibbles(parts.scales),
    ]  # fmt: skip
    return np.concatenate(fields, axis=1)


def _split_iq1_s(blocks: Bytes) -> Parts:
    points, steps, down = iq1_s.split(blocks)
    codes = points + IQ1_POINTS * down.repeat(points.shape[1] // down.shape[1], axis=1)
    return Parts(from_halves(blocks, 0)[:, 0], 2 * steps + 1, codes)


def _join_iq1_s(parts: Parts) -> Bytes:
    points, down = parts.codes % IQ1_POINTS, parts.codes // IQ1_POINTS
    groups = points.shape[1] // parts.scales.shape[1]
    return iq1_s.join(halves(parts.d), points, parts.scales >> 1, down[:, ::groups])


def _split_iq1_m(blocks: Bytes) -> Parts:
    d, points, steps, down = iq1_m.split(blocks)
    return Parts(d, 2 * steps + 1, points + IQ1_POINTS * down)


def _join_iq1_m(parts: Parts) -> Bytes:
    points, down = parts.codes % IQ1_POINTS, parts.codes // IQ1_POINTS
    return iq1_m.join(halves(parts.d), points, parts.scales >> 1, down)


IQ1_POINTS = 2048
"""Of IQ1's grid, each shifted up or down."""
_IQ1_SCALES = (1, 15)

CODEBOOKS: dict[str, CodebookLattice] = {
    "IQ1_S": CodebookLattice(
        "IQ1_S", 32, 8, 1.0, False, _split_iq1_s, _join_iq1_s, _IQ1_SCALES,
        shift=float(SHIFT), shared_shift=True,
    ),
    "IQ1_M": CodebookLattice(
        "IQ1_M", 16, 8, 1.0, False, _split_iq1_m, _join_iq1_m, _IQ1_SCALES, shift=float(SHIFT)
    ),
    "IQ2_XXS": CodebookLattice("IQ2_XXS", 32, 8, 1 / 8, True, _split_iq2_xxs, _join_iq2_xxs),
    "IQ2_XS": CodebookLattice("IQ2_XS", 16, 8, 1 / 8, True, _split_iq2_xs, _join_iq2_xs),
    "IQ2_S": CodebookLattice("IQ2_S", 16, 8, 1 / 8, False, _split_iq2_s, _join_iq2_s),
    "IQ3_XXS": CodebookLattice("IQ3_XXS", 32, 4, 1 / 4, True, _split_iq3_xxs, _join_iq3_xxs),
    "IQ3_S": CodebookLattice("IQ3_S", 32, 4, 1.0, False, _split_iq3_s, _join_iq3_s),
}  # fmt: skip
"""The formats whose weights are coded as points of a grid."""
