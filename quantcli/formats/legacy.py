"""What the formats of 32 weights share: plain scales, nibbles and fifth bits, in strict float32.

Source: the ``quantize_row_q*_ref`` functions of ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats.base import Bytes, Floats
from quantcli.formats.search import Codes


def inverse_of(scale: Floats) -> Floats:
    """``1 / scale``, or 0 where the scale is 0; infinite where it is too small to invert."""
    with np.errstate(all="ignore"):
        inverse: Floats = np.where(scale != 0, np.float32(1) / scale, np.float32(0))
    return inverse


def signed_scale(blocks: Floats, lowest: int) -> tuple[Floats, Floats]:
    """The scale, and its inverse, that turn the (first) largest magnitude into code ``lowest``."""
    top = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
    # The reference starts from a positive zero and takes only what exceeds it.
    start: Floats = np.where(top != 0, top, np.float32(0))
    scale = start / np.float32(lowest)
    return scale, inverse_of(scale)


def ranged_scale(blocks: Floats, highest: int) -> tuple[Floats, Floats, Floats]:
    """Scale, its inverse and the minimum that spread a block over codes ``0 .. highest``."""
    each = np.arange(len(blocks))
    # By position: of several zeros the first one gives its sign, which min() does not promise.
    low, top = blocks[each, blocks.argmin(axis=1)], blocks[each, blocks.argmax(axis=1)]
    with np.errstate(over="ignore"):
        scale: Floats = (top - low) / np.float32(highest)
    return scale, inverse_of(scale), low


def truncate(values: Floats) -> Codes:
    """Towards zero, as x86 converts a float to a byte: what no int32 can hold becomes 0."""
    held = np.where(np.abs(values) < np.float32(2**31), values, np.float32(0))
    return held.astype(np.int32)


def join_nibbles(codes: Codes) -> Bytes:
    """16 bytes per block: byte j holds the low four bits of codes j (low) and j+16 (high)."""
    low, high = codes[:, :16] & 15, codes[:, 16:] & 15
    return (low | high << 4).astype(np.uint8)


def split_nibbles(packed: Bytes) -> Codes:
    """The inverse of `join_nibbles`: 32 codes per block."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.int32)


def join_fifth_bits(codes: Codes) -> Bytes:
    """4 bytes per block: bit j of the little-endian word is bit 4 of code j."""
    return np.packbits((codes >> 4 & 1).astype(np.uint8), axis=1, bitorder="little")


def split_fifth_bits(packed: Bytes) -> Codes:
    """The inverse of `join_fifth_bits`: 0 or 16 for each of 32 codes."""
    bits = np.unpackbits(packed, axis=1, bitorder="little")
    return bits.astype(np.int32) << 4
