"""A dense little-endian stream of codes in 32-bit words: element i lies at bit ``i * bits``.

A code may begin in one word and end in the next, as 3, 5, 6 and 7 bits do; no bit is wasted.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD = 32

Codes = NDArray[np.uint8]
Words = NDArray[np.uint32]


def word_count(count: int, bits: int) -> int:
    """Words that ``count`` codes of ``bits`` bits fill."""
    return -(-count * bits // WORD)


def pack_bits(codes: NDArray[Any], bits: int) -> Words:
    """Codes (..., n) as words, uint32 of shape (..., word_count(n, bits)); the rest is zeros."""
    period, words = _period(bits)
    count = codes.shape[-1]
    if count % period:
        tail = [(0, 0)] * (codes.ndim - 1) + [(0, -count % period)]
        codes = np.pad(codes, tail)
    blocks = codes.reshape(*codes.shape[:-1], -1, period)
    packed = np.zeros((*blocks.shape[:-1], words), np.uint32)
    for index in range(period):
        word, shift = divmod(index * bits, WORD)
        code = blocks[..., index].astype(np.uint32)
        packed[..., word] |= code << np.uint32(shift)
        if shift + bits > WORD:
            packed[..., word + 1] |= code >> np.uint32(WORD - shift)
    whole = packed.reshape(*codes.shape[:-1], -1)
    return np.ascontiguousarray(whole[..., : word_count(count, bits)])


def unpack_bits(words: NDArray[Any], bits: int, count: int) -> Codes:
    """The first ``count`` codes of words (..., w), uint8 of shape (..., count)."""
    period, span = _period(bits)
    words = np.ascontiguousarray(words).view(np.uint32)
    if words.shape[-1] % span:
        tail = [(0, 0)] * (words.ndim - 1) + [(0, -words.shape[-1] % span)]
        words = np.pad(words, tail)
    blocks = words.reshape(*words.shape[:-1], -1, span)
    codes = np.empty((*blocks.shape[:-1], period), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for index in range(period):
        word, shift = divmod(index * bits, WORD)
        code = blocks[..., word] >> np.uint32(shift)
        if shift + bits > WORD:
            code = code | blocks[..., word + 1] << np.uint32(WORD - shift)
        codes[..., index] = code & mask
    return np.ascontiguousarray(codes.reshape(*words.shape[:-1], -1)[..., :count])


def _period(bits: int) -> tuple[int, int]:
    """After how many codes the pattern repeats at a word's start, and how many words later."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    common = math.gcd(bits, WORD)
    return WORD // common, bits // common
