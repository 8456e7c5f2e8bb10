"""Block formats taken apart: the scales of a block, and the code of every weight.

A calibrated method chooses codes one by one under scales that it has fixed before, so it needs
what a format's encoder keeps to itself. Of the formats in `LATTICES` every weight is

    d * scale * level[code] - dmin * minimum

with an integer ``scale`` and ``minimum`` for each run of ``sub`` weights. `Lattice.split` takes
packed blocks apart and `Lattice.join` packs them again; joining what was split gives the same
bytes, and any parts within the ranges give blocks that llama.cpp decodes to just these values.

Source: the layouts in the formats' own files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from quantcli.formats import iq4_xs, legacy, microscale, nvfp4, tq1_0
from quantcli.formats.base import Bytes, Floats
from quantcli.formats.iq4_nl import LEVELS
from quantcli.formats.kquants import join_planes, join_scales, split_planes, split_scales
from quantcli.formats.search import Codes, from_halves, halves


@dataclass(frozen=True, slots=True)
class Parts:
    """``n`` blocks apart: ``d`` (n,), ``scales`` (n, subs), ``codes`` (n, block).

    ``dmin`` (n,) and ``mins`` (n, subs) are there where the format has minimums.
    """

    d: Floats
    scales: Codes
    codes: Codes
    dmin: Floats | None = None
    mins: Codes | None = None

    @property
    def minimums(self) -> tuple[Floats, Codes]:
        """``dmin`` and ``mins`` of a format that has them; ValueError for another."""
        if self.dmin is None or self.mins is None:
            raise ValueError("these blocks have no minimums")
        return self.dmin, self.mins


@dataclass(frozen=True, slots=True)
class Lattice:
    """How a scalar format's blocks divide, and what its codes stand for.

    ``levels`` are the values of codes ``0, 1, ...``; they rise, but for the floats of four bits.
    ``scale_range`` and ``min_range`` are what an integer scale or minimum may be; equal ends mean
    that there is nothing to choose. ``half`` tells that ``d`` is a float16, else a power of two or
    a small float that the encoder alone sets.
    """

    block: int
    sub: int
    levels: Floats
    split: Callable[[Bytes], Parts]
    join: Callable[[Parts], Bytes]
    scale_range: tuple[int, int] = (1, 1)
    min_range: tuple[int, int] | None = None
    half: bool = True

    def values(self, parts: Parts) -> Floats:
        """The weights, float32 of shape (n, block)."""
        step, low = self.steps(parts)
        subs = self.levels[parts.codes].reshape(len(parts.codes), -1, self.sub)
        return (step[:, :, None] * subs - low[:, :, None]).reshape(parts.codes.shape)

    def steps(self, parts: Parts) -> tuple[Floats, Floats]:
        """``d * scale`` and ``dmin * minimum``, each of shape (n, subs), float32."""
        step: Floats = parts.d[:, None] * parts.scales.astype(np.float32)
        if parts.dmin is None or parts.mins is None:
            return step, np.zeros_like(step)
        return step, parts.dmin[:, None] * parts.mins.astype(np.float32)


def _range(first: int, last: int) -> Floats:
    return np.arange(first, last + 1, dtype=np.float32)


def _ones(blocks: Bytes) -> Codes:
    return np.ones((len(blocks), 1), np.int32)


def _flat(count: int, place: int, codes: Callable[[Bytes], Codes]) -> Callable[[Bytes], Parts]:
    """Blocks with one scale; ``count`` float16 at ``place``, the second one a minimum."""

    def split(blocks: Bytes) -> Parts:
        d, ones = from_halves(blocks, place)[:, 0], _ones(blocks)
        if count == 1:
            return Parts(d, ones, codes(blocks))
        return Parts(d, ones, codes(blocks), -from_halves(blocks, place + 2)[:, 0], ones)

    return split


def _head(parts: Parts) -> list[Bytes]:
    return [halves(parts.d)] if parts.dmin is None else [halves(parts.d), halves(-parts.dmin)]


def _join_fifths(parts: Parts) -> Bytes:
    tail = [legacy.join_fifth_bits(parts.codes), legacy.join_nibbles(parts.codes)]
    return np.concatenate([*_head(parts), *tail], axis=1)


def _join_nibbles(parts: Parts) -> Bytes:
    return np.concatenate([*_head(parts), legacy.join_nibbles(parts.codes)], axis=1)


def _split_q8(blocks: Bytes) -> Parts:
    codes = blocks[:, 2:].view(np.int8).astype(np.int32) + 127
    # The encoder never writes -128, which some of llama.cpp's products cannot take.
    return Parts(from_halves(blocks, 0)[:, 0], _ones(blocks), np.maximum(codes, 0))


def _join_q8(parts: Parts) -> Bytes:
    codes = (parts.codes - 127).astype(np.int8).view(np.uint8)
    return np.concatenate([halves(parts.d), codes], axis=1)


def _two(blocks: Bytes, place: int) -> tuple[Floats, Floats]:
    return from_halves(blocks, place)[:, 0], from_halves(blocks, place + 2)[:, 0]


def _split_q2_k(blocks: Bytes) -> Parts:
    d, dmin = _two(blocks, 80)
    scales = blocks[:, :16].astype(np.int32)
    return Parts(d, scales & 15, split_planes(blocks[:, 16:80], 2, 32), dmin, scales >> 4)


def _join_q2_k(parts: Parts) -> Bytes:
    dmin, mins = parts.minimums
    scales = (parts.scales | mins << 4).astype(np.uint8)
    tail = [halves(parts.d), halves(dmin)]
    return np.concatenate([scales, join_planes(parts.codes, 2, 32), *tail], axis=1)


def _split_q3_k(blocks: Bytes) -> Parts:
    codes = split_planes(blocks[:, 32:96], 2, 32) | split_planes(blocks[:, :32], 1, 32) << 2
    scales = split_planes(blocks[:, 96:104], 4, 8) | split_planes(blocks[:, 104:108], 2, 4) << 4
    return Parts(from_halves(blocks, 108)[:, 0], scales - 32, codes)


def _join_q3_k(parts: Parts) -> Bytes:
    codes, scales = parts.codes, parts.scales + 32
    planes = [join_planes(codes >> 2, 1, 32), join_planes(codes, 2, 32)]
    nibbles = [join_planes(scales, 4, 8), join_planes(scales >> 4, 2, 4)]
    return np.concatenate([*planes, *nibbles, halves(parts.d)], axis=1)


def _split_q4_k(blocks: Bytes) -> Parts:
    d, dmin = _two(blocks, 0)
    scales, mins = split_scales(blocks[:, 4:16])
    return Parts(d, scales, split_planes(blocks[:, 16:], 4, 32), dmin, mins)


def _split_q5_k(blocks: Bytes) -> Parts:
    codes = split_planes(blocks[:, 48:], 4, 32) | split_planes(blocks[:, 16:48], 1, 32) << 4
    return replace(_split_q4_k(blocks[:, :144]), codes=codes)


def _k_head(parts: Parts) -> list[Bytes]:
    dmin, mins = parts.minimums
    return [halves(parts.d), halves(dmin), join_scales(parts.scales, mins)]


def _join_q4_k(parts: Parts) -> Bytes:
    return np.concatenate([*_k_head(parts), join_planes(parts.codes, 4, 32)], axis=1)


def _join_q5_k(parts: Parts) -> Bytes:
    planes = [join_planes(parts.codes >> 4, 1, 32), join_planes(parts.codes, 4, 32)]
    return np.concatenate([*_k_head(parts), *planes], axis=1)


def _split_q6_k(blocks: Bytes) -> Parts:
    codes = split_planes(blocks[:, :128], 4, 64) | split_planes(blocks[:, 128:192], 2, 32) << 4
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.int32)
    return Parts(from_halves(blocks, 208)[:, 0], scales, codes)


def _join_q6_k(parts: Parts) -> Bytes:
    planes = [join_planes(parts.codes, 4, 64), join_planes(parts.codes >> 4, 2, 32)]
    scales = parts.scales.astype(np.int8).view(np.uint8)
    return np.concatenate([*planes, scales, halves(parts.d)], axis=1)


def _split_iq4_xs(blocks: Bytes) -> Parts:
    codes = legacy.split_nibbles(blocks[:, 8:].reshape(-1, 16)).reshape(len(blocks), -1)
    return Parts(from_halves(blocks, 0)[:, 0], iq4_xs.split_scales(blocks) - 32, codes)


def _join_iq4_xs(parts: Parts) -> Bytes:
    codes = legacy.join_nibbles(parts.codes.reshape(-1, 32)).reshape(len(parts.codes), -1)
    head = [halves(parts.d), iq4_xs.join_scales(parts.scales + 32)]
    return np.concatenate([*head, codes], axis=1)


def _split_tq1_0(blocks: Bytes) -> Parts:
    return Parts(from_halves(blocks, 52)[:, 0], _ones(blocks), tq1_0.split_trits(blocks))


def _join_tq1_0(parts: Parts) -> Bytes:
    return np.concatenate([tq1_0.join_trits(parts.codes), halves(parts.d)], axis=1)


def _split_tq2_0(blocks: Bytes) -> Parts:
    codes = split_planes(blocks[:, :64], 2, 32)
    return Parts(from_halves(blocks, 64)[:, 0], _ones(blocks), np.minimum(codes, 2))


def _join_tq2_0(parts: Parts) -> Bytes:
    return np.concatenate([join_planes(parts.codes, 2, 32), halves(parts.d)], axis=1)


def _join_q2_0(parts: Parts) -> Bytes:
    quads = parts.codes.reshape(len(parts.codes), -1, 4) << np.arange(0, 8, 2)
    return np.concatenate([halves(parts.d), quads.sum(axis=2).astype(np.uint8)], axis=1)


def _split_q2_0(blocks: Bytes) -> Parts:
    codes = blocks[:, 2:, None].astype(np.int32) >> np.arange(0, 8, 2, dtype=np.int32) & 3
    return Parts(from_halves(blocks, 0)[:, 0], _ones(blocks), codes.reshape(len(blocks), -1))


def _split_q1_0(blocks: Bytes) -> Parts:
    signs = np.unpackbits(np.ascontiguousarray(blocks[:, 2:]), axis=1, bitorder="little")
    return Parts(from_halves(blocks, 0)[:, 0], _ones(blocks), signs.astype(np.int32))


def _join_q1_0(parts: Parts) -> Bytes:
    signs = np.packbits(parts.codes.astype(np.uint8), axis=1, bitorder="little")
    return np.concatenate([halves(parts.d), signs], axis=1)


def _split_mxfp4(blocks: Bytes) -> Parts:
    d = np.ldexp(np.float32(1), blocks[:, 0].astype(np.int32) - 128)
    return Parts(d, _ones(blocks), legacy.split_nibbles(blocks[:, 1:]))


def _join_mxfp4(parts: Parts) -> Bytes:
    exponent = (np.frexp(parts.d)[1] + 127).astype(np.uint8)[:, None]
    return np.concatenate([exponent, legacy.join_nibbles(parts.codes)], axis=1)


_E4M3 = nvfp4.scales(np.arange(0x7F, dtype=np.uint8))
"""What the scales' codes 0 to 0x7e stand for, in rising order."""


def _split_nvfp4(blocks: Bytes) -> Parts:
    # All scales are multiples of the least one.
    scales = np.ldexp(nvfp4.scales(blocks[:, : nvfp4.GROUPS]), 10).astype(np.int32)
    codes = nvfp4.split_codes(blocks).reshape(len(blocks), -1)
    return Parts(np.full(len(blocks), 2.0**-10, np.float32), scales, codes)


def _join_nvfp4(parts: Parts) -> Bytes:
    scales = np.searchsorted(_E4M3, np.ldexp(parts.scales.astype(np.float32), -10))
    codes = nvfp4.join_codes(parts.codes.reshape(-1, nvfp4.GROUP))
    return np.concatenate([scales.astype(np.uint8), codes], axis=1)


def _nibbles(start: int) -> Callable[[Bytes], Codes]:
    return lambda blocks: legacy.split_nibbles(blocks[:, start:])


def _fifths(start: int) -> Callable[[Bytes], Codes]:
    def split(blocks: Bytes) -> Codes:
        high = legacy.split_fifth_bits(np.ascontiguousarray(blocks[:, start : start + 4]))
        return legacy.split_nibbles(blocks[:, start + 4 :]) | high

    return split


_SIGNED = (-127, 127)

LATTICES: dict[str, Lattice] = {
    "Q4_0": Lattice(32, 32, _range(-8, 7), _flat(1, 0, _nibbles(2)), _join_nibbles),
    "Q4_1": Lattice(
        32, 32, _range(0, 15), _flat(2, 0, _nibbles(4)), _join_nibbles, min_range=(1, 1)
    ),
    "Q5_0": Lattice(32, 32, _range(-16, 15), _flat(1, 0, _fifths(2)), _join_fifths),
    "Q5_1": Lattice(32, 32, _range(0, 31), _flat(2, 0, _fifths(4)), _join_fifths, min_range=(1, 1)),
    "Q8_0": Lattice(32, 32, _range(*_SIGNED), _split_q8, _join_q8),
    "Q2_K": Lattice(256, 16, _range(0, 3), _split_q2_k, _join_q2_k, (0, 15), (0, 15)),
    "Q3_K": Lattice(256, 16, _range(-4, 3), _split_q3_k, _join_q3_k, (-32, 31)),
    "Q4_K": Lattice(256, 32, _range(0, 15), _split_q4_k, _join_q4_k, (0, 63), (0, 63)),
    "Q5_K": Lattice(256, 32, _range(0, 31), _split_q5_k, _join_q5_k, (0, 63), (0, 63)),
    "Q6_K": Lattice(256, 16, _range(-32, 31), _split_q6_k, _join_q6_k, (-128, 127)),
    "IQ4_NL": Lattice(32, 32, LEVELS, _flat(1, 0, _nibbles(2)), _join_nibbles),
    "IQ4_XS": Lattice(256, 32, LEVELS, _split_iq4_xs, _join_iq4_xs, (-32, 31)),
    "TQ1_0": Lattice(256, 256, _range(-1, 1), _split_tq1_0, _join_tq1_0),
    "TQ2_0": Lattice(256, 256, _range(-1, 1), _split_tq2_0, _join_tq2_0),
    "Q1_0": Lattice(128, 128, np.array([-1, 1], np.float32), _split_q1_0, _join_q1_0),
    "Q2_0": Lattice(64, 64, _range(-1, 2), _split_q2_0, _join_q2_0),
    "MXFP4": Lattice(32, 32, microscale.VALUES, _split_mxfp4, _join_mxfp4, half=False),
    "NVFP4": Lattice(64, 16, microscale.VALUES, _split_nvfp4, _join_nvfp4, half=False),
}
"""The formats whose weights are coded one by one."""
