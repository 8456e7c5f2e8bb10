"""What the formats of 256 weights share: sub-blocks, their rounded scales, and bit planes.

A super-block of 256 weights is 8 or 16 sub-blocks, each with a small integer scale (and minimum)
that a float16 of the super-block multiplies. Codes are stored in planes: the parts of one byte
belong to weights 32 (or 64) apart, so that a decoder unpacks whole vectors.

Source: the ``quantize_row_q*_K`` functions of ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantcli.formats.base import Bytes, Floats
from quantcli.formats.ksearch import round_to_largest, search_positive
from quantcli.formats.search import (
    Codes,
    from_halves,
    importance_weights,
    nearest,
    ordered_sum,
    search_affine,
)

SUPER = 256


def super_importance(rows: Floats, importance: Floats, factor: int) -> Floats:
    """Search weights, shape (super-blocks, 256): ``sigma2`` is ``factor`` times the mean square."""
    blocks = rows.reshape(-1, SUPER)
    with np.errstate(all="ignore"):
        sigma2 = np.float32(factor) * ordered_sum(blocks * blocks) / np.float32(SUPER)
    spread = np.broadcast_to(importance, rows.shape).reshape(-1, SUPER)
    return importance_weights(blocks, spread, sigma2[:, None])


@dataclass(frozen=True, slots=True)
class AffineType:
    """The parameters of Q2_K, Q4_K and Q5_K."""

    length: int
    """Weights in a sub-block."""
    top: int
    """The largest code of a weight."""
    scale_top: int
    """The largest code of a sub-block's scale or minimum."""
    trials: tuple[float, float, int]
    """``rmin``, ``rdelta`` and ``nstep`` of the search without importance weights."""
    factor: int
    """Importance weights take this multiple of the mean square as ``sigma2``."""


@dataclass(frozen=True, slots=True)
class AffineBlocks:
    """Encoded super-blocks: weight = ``d * scales * code - dmin * mins``."""

    d: Floats
    dmin: Floats
    scales: Codes
    mins: Codes
    codes: Codes
    """The codes of the search, which stay where a scale rounds to zero; shape (n, 256)."""


def search_affine_blocks(rows: Floats, importance: Floats | None, kind: AffineType) -> AffineBlocks:
    """Search every sub-block's scale and minimum, and round them within their super-block."""
    subs = rows.reshape(-1, kind.length)
    count = SUPER // kind.length
    if importance is None:
        # Q2_K weighs by magnitude and counts absolute errors; the others add the root mean square.
        absolute = kind.length == 16
        weights = np.abs(subs)
        if not absolute:
            with np.errstate(over="ignore"):
                square = ordered_sum(subs * subs) / np.float32(kind.length)
                weights = np.sqrt(square)[:, None] + weights
        rmin, rdelta, nstep = kind.trials
        scale, low, codes = search_affine(
            subs, weights, kind.top, rmin=rmin, rdelta=rdelta, nstep=nstep, use_mad=absolute
        )
        d, scales = round_to_largest(scale.reshape(-1, count), kind.scale_top)
        dmin, mins = round_to_largest(-low.reshape(-1, count), kind.scale_top)
    else:
        weights = super_importance(rows, importance, kind.factor).reshape(subs.shape)
        scale, low, codes = search_affine(subs, weights, kind.top, rmin=-0.9, rdelta=0.05, nstep=36)
        with np.errstate(all="ignore"):
            total = ordered_sum(weights).reshape(-1, count)
        d, scales = search_positive(scale.reshape(-1, count), total, kind.scale_top)
        dmin, mins = search_positive(-low.reshape(-1, count), total, kind.scale_top)
    return AffineBlocks(d, dmin, scales, mins, codes.reshape(-1, SUPER))


def round_affine(rows: Floats, scale: Floats, low: Floats, found: Codes, top: int) -> Codes:
    """Codes under the rounded ``scale`` and ``low`` (subtracted), shape (super-blocks, subs).

    Where the scale is zero the codes ``found`` by the search stay; the result is (n, 256).
    """
    x = rows.reshape(*scale.shape, -1)
    with np.errstate(all="ignore"):
        codes = np.clip(nearest((x + low[:, :, None]) / scale[:, :, None]), 0, top)
    codes = np.where(scale[:, :, None] != 0, codes, found.reshape(x.shape))
    return codes.reshape(-1, SUPER)


def round_symmetric(rows: Floats, scale: Floats, found: Codes, nmax: int) -> Codes:
    """Codes ``0 .. 2*nmax-1`` under the rounded ``scale``, as `round_affine`."""
    x = rows.reshape(*scale.shape, -1)
    with np.errstate(all="ignore"):
        codes = np.clip(nearest(x / scale[:, :, None]), -nmax, nmax - 1) + nmax
    codes = np.where(scale[:, :, None] != 0, codes, found.reshape(x.shape))
    return codes.reshape(-1, SUPER)


def join_scales(scales: Codes, mins: Codes) -> Bytes:
    """12 bytes of eight 6-bit scales and minimums each.

    Bytes 0-3 and 4-7 hold the first four scales and minimums in their low six bits, bytes 8-11 the
    low nibbles of the last four of both; the last four's high bits are on top of bytes 0-7. As in
    ggml, what exceeds six bits spills into the neighbour.
    """
    low, high = (scales[:, :4], mins[:, :4]), (scales[:, 4:], mins[:, 4:])
    first, second = (a | b >> 4 << 6 for a, b in zip(low, high, strict=True))
    third = high[0] & 15 | (high[1] & 15) << 4
    return (np.concatenate([first, second, third], axis=1) & 255).astype(np.uint8)


def split_scales(packed: Bytes) -> tuple[Codes, Codes]:
    """The inverse of `join_scales`: scales and minimums, each of shape (n, 8)."""
    first, second, third = np.split(packed.astype(np.int32), 3, axis=1)
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    mins = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales, mins


def affine_scales(head: Bytes) -> tuple[Floats, Floats]:
    """Scale and minimum per sub-block, shape (n, 8), of the 16 bytes ``d``, ``dmin``, scales."""
    scales, mins = split_scales(head[:, 4:])
    with np.errstate(invalid="ignore"):
        scale = from_halves(head, 0) * scales.astype(np.float32)
        low = from_halves(head, 2) * mins.astype(np.float32)
    return scale, low


def join_planes(codes: Codes, bits: int, span: int) -> Bytes:
    """Codes of 1, 2 or 4 bits, ``8 // bits`` to a byte, from weights ``span`` apart."""
    planes = (codes & (1 << bits) - 1).reshape(len(codes), -1, 8 // bits, span)
    shifts = (np.arange(8 // bits) * bits)[:, None]
    packed: Codes = np.bitwise_or.reduce(planes << shifts, axis=2)
    return packed.reshape(len(codes), -1).astype(np.uint8)


def split_planes(packed: Bytes, bits: int, span: int) -> Codes:
    """The inverse of `join_planes`."""
    planes = packed.reshape(len(packed), -1, 1, span).astype(np.int32)
    shifts = (np.arange(8 // bits) * bits)[:, None]
    return (planes >> shifts & (1 << bits) - 1).reshape(len(packed), -1)


def scaled(codes: Codes, scale: Floats) -> Floats:
    """``scale * code`` per weight, for scales of shape (n, subs); shape (n, subs, length)."""
    values: Floats = scale[:, :, None] * codes.reshape(*scale.shape, -1).astype(np.float32)
    return values
