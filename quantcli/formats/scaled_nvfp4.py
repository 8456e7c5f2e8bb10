"""NVFP4 under a scale of the whole tensor, as llama.cpp loads it from a tensor ``….scale`` beside.

A weight is ``value(code) * scale / 2 * tensor scale``. The tensor's scale brings its largest block
scale to 448, the largest that UE4M3 has, so that small weights do not meet the format's least
scales; block scales are searched as in folders (`quantcli.formats.float_grid`). llama.cpp's own
encoder, `quantcli.formats.nvfp4`, has neither.

Source: ``build_lora_mm`` of llama-graph.cpp, and ``_repack_nvfp4`` of llama.cpp's converter.
"""

from __future__ import annotations

import numpy as np

from quantcli.formats import native
from quantcli.formats.base import Bytes, Floats
from quantcli.formats.float_grid import FloatGrid
from quantcli.formats.integer import Search
from quantcli.formats.nvfp4 import FORMAT, GROUPS, NBYTES, join_codes

GRID = FloatGrid("E2M1", "group", 16, "E4M3")


def tensor_scale(largest: float) -> float:
    """The scale of a tensor whose largest magnitude is ``largest``; 1 where there is none."""
    return float(np.float32(1) / np.float32(GRID.bind(largest).whole))


def encode(rows: Floats, scale: float, importance: Floats | None, search: Search = "mse") -> Bytes:
    """Packed rows, uint8 of shape (n, row bytes), of weights (n, columns), float32.

    UnencodableError for a weight that is not finite.
    """
    grid = GRID.with_whole(float(np.float32(1) / np.float32(scale)))
    scales, _ = grid.fit(rows, importance, search)
    codes = grid.quantize(rows, scales)
    packed = np.empty((rows.size // FORMAT.block, NBYTES), np.uint8)
    packed[:, :GROUPS] = grid.scale_codes(scales).reshape(-1, GROUPS)
    packed[:, GROUPS:] = join_codes(codes.reshape(-1, 16).astype(np.int32))
    return packed.reshape(len(rows), -1)


def decode(packed: Bytes, scale: float | Floats) -> Floats:
    """Weights, float32 of shape (n, columns); ``scale`` is one, or a column of the rows'."""
    return native.decode(FORMAT, packed) * np.asarray(scale, np.float32)
