"""The packed layouts read back from their definitions, a bit at a time; nothing of ours is used."""

from __future__ import annotations

import numpy as np

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def codes_in(words: np.ndarray, bits: int) -> np.ndarray:
    """Little-endian codes (rows, n) in the 32-bit words (rows, w)."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    stream = np.unpackbits(raw, axis=-1, bitorder="little")
    count = stream.shape[-1] // bits
    return stream[:, : count * bits].reshape(-1, count, bits) @ (1 << np.arange(bits))


def unpack_gptq(tensors: dict[str, np.ndarray], module: str, config: dict) -> np.ndarray:
    """Weights (out, in) of a GPTQ module: scale * (code - zero), by ``g_idx``."""
    bits = config["bits"]
    codes = codes_in(tensors[f"{module}.qweight"].T, bits)
    less = {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
    zeros = codes_in(tensors[f"{module}.qzeros"], bits) + less
    scales = tensors[f"{module}.scales"].astype(np.float32)
    groups = tensors[f"{module}.g_idx"]
    return (codes - zeros[groups].T).astype(np.float32) * scales[groups].T


def unpack_awq(tensors: dict[str, np.ndarray], module: str, config: dict) -> np.ndarray:
    """Weights (out, in) of an AWQ module in the GEMM layout."""

    def deinterleave(words: np.ndarray) -> np.ndarray:
        nibbles = codes_in(words, 4)
        across = np.empty_like(nibbles)
        for nibble, place in enumerate(AWQ_ORDER):
            across[:, place::8] = nibbles[:, nibble::8]
        return across

    codes = deinterleave(tensors[f"{module}.qweight"])
    size = config["group_size"] if config["group_size"] > 0 else len(codes)
    groups = np.arange(len(codes)) // size
    zeros = deinterleave(tensors[f"{module}.qzeros"])
    scales = tensors[f"{module}.scales"].astype(np.float32)
    return ((codes - zeros[groups]).astype(np.float32) * scales[groups]).T
