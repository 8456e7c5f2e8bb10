"""compressed-tensors' "mxfp4-pack-quantized": MXFP4 blocks with the same codes and scales.

Both follow the OCP specification: 32 weights in E2M1 under a power of two as a byte (E8M0). Only
the order of the nibbles differs: GGUF puts weights j and j+16 into a byte, compressed-tensors
neighbours. Source: ``MXFP4PackedCompressor`` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from quantcli.formats.integer import IntegerCodes, IntegerGrid
from quantcli.formats.legacy import split_nibbles
from quantcli.layouts.base import FolderFacts, Packing, Patch
from quantcli.layouts.compressed_tensors.groups import describe_config
from quantcli.types import Declared, Matrix

_GROUP = 32
_BLOCK_BYTES = 17


def _declare(matrix: Matrix, grid: IntegerGrid) -> list[Declared]:
    return [
        Declared(f"{matrix.module}.weight_packed", "U8", (matrix.rows, matrix.columns // 2)),
        Declared(f"{matrix.module}.weight_scale", "U8", (matrix.rows, matrix.columns // _GROUP)),
    ]


def _place(matrix: Matrix, grid: IntegerGrid, start: int, coded: IntegerCodes) -> Iterator[Patch]:
    blocks = coded.codes.reshape(-1, _BLOCK_BYTES)
    codes = split_nibbles(blocks[:, 1:]).astype(np.uint8).reshape(len(coded.codes), -1)
    pairs = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    yield Patch(f"{matrix.module}.weight_packed", pairs, start)
    yield Patch(f"{matrix.module}.weight_scale", blocks[:, 0].reshape(len(codes), -1), start)


def _describe(subject: FolderFacts) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": _GROUP,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
    }
    scheme = {"weights": weights, "input_activations": None}
    return describe_config(subject, "mxfp4-pack-quantized", scheme)


MXFP4 = Packing(_declare, _place, _describe)
