"""GPTQ's and AWQ's tensors, one code at a time, straight from the layouts' definitions.

The libraries that write them need a newer torch than this project tests with. Slow on purpose:
nothing is vectorised along an axis that is packed, and quantcli's packing is not used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def put_bits(codes: list[int], bits: int) -> list[int]:
    """A stream of codes, the lowest bit first, cut into words of 32 bits."""
    stream = 0
    for place, code in enumerate(codes):
        assert 0 <= code < 1 << bits
        stream |= code << (place * bits)
    count = -(-len(codes) * bits // 32)
    return [stream >> (32 * word) & 0xFFFFFFFF for word in range(count)]


def quantize(
    weights: NDArray[np.float32], bits: int, order: NDArray[np.int64], *, symmetric: bool
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float16]]:
    """Codes (out, in), zero points and float16 scales (out, groups); ``order`` is the group."""
    groups = int(order.max()) + 1
    most = (1 << bits) - 1
    rows = weights.shape[0]
    scales = np.empty((rows, groups), np.float16)
    zeros = np.empty((rows, groups), np.int64)
    codes = np.empty(weights.shape, np.int64)
    for group in range(groups):
        part = weights[:, order == group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scales[:, group] = 2 * np.maximum(-low, high) / most
            zeros[:, group] = (most + 1) // 2
        else:
            scales[:, group] = (high - low) / most
            zeros[:, group] = np.round(-low / scales[:, group].astype(np.float32))
        scale = scales[:, group, None].astype(np.float32)
        steps = np.round(part / scale) + zeros[:, group, None]
        codes[:, order == group] = np.clip(steps, 0, most)
    return codes, zeros, scales


def dequantize(
    codes: NDArray[Any], zeros: NDArray[Any], scales: NDArray[Any], order: NDArray[np.int64]
) -> NDArray[np.float32]:
    """What the codes stand for, in float32."""
    steps = (codes - zeros[:, order]).astype(np.float32)
    return steps * scales.astype(np.float32)[:, order]


def gptq(
    codes: NDArray[Any], zeros: NDArray[Any], scales: NDArray[Any], bits: int, *, version: int
) -> dict[str, NDArray[Any]]:
    """``qweight``, ``qzeros`` and ``scales``; version 1 stores a zero point less one.

    GPTQModel subtracts it from whole words, except for 3 bits, whose fields cross words.
    """
    rows = codes.shape[0]
    columns = [put_bits(codes[row].tolist(), bits) for row in range(rows)]
    crossing = version == 1 and bits == 3
    kept = (zeros - 1) % 8 if crossing else zeros
    stored = [put_bits(kept[:, group].tolist(), bits) for group in range(zeros.shape[1])]
    if version == 1 and not crossing:
        one = put_bits([1] * rows, bits)
        stored = [
            [(word - less) % (1 << 32) for word, less in zip(words, one, strict=True)]
            for words in stored
        ]
    return {
        "qweight": np.array(columns, np.uint32).T.copy().view(np.int32),
        "qzeros": np.array(stored, np.uint32).view(np.int32),
        "scales": np.ascontiguousarray(scales.T),
    }


def awq(codes: NDArray[Any], zeros: NDArray[Any], scales: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """``qweight``, ``qzeros`` and ``scales`` of the GEMM version."""

    def words(values: list[int]) -> list[int]:
        return [
            sum(values[start + AWQ_ORDER[place]] << (4 * place) for place in range(8))
            for start in range(0, len(values), 8)
        ]

    inputs = [words(codes[:, column].tolist()) for column in range(codes.shape[1])]
    stored = [words(zeros[:, group].tolist()) for group in range(zeros.shape[1])]
    return {
        "qweight": np.array(inputs, np.uint32).view(np.int32),
        "qzeros": np.array(stored, np.uint32).view(np.int32),
        "scales": np.ascontiguousarray(scales.T),
    }
