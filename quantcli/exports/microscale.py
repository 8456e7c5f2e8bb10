"""MXFP4 blocks as compressed-tensors' "mxfp4-pack-quantized", and back: the same codes and scales.

Both follow the OCP specification: 32 weights in E2M1 under a power of two as a byte (E8M0). Only
the order of the nibbles differs: GGUF puts weights j and j+16 into a byte, compressed-tensors
neighbours. Source: ``MXFP4PackedCompressor`` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.safetensors_container import Declared
from quantcli.checkpoint_view import CheckpointView
from quantcli.formats import get_format, native
from quantcli.formats.integer import IntegerCodes, IntegerGrid
from quantcli.formats.legacy import split_nibbles
from quantcli.layouts.base import Packing, Patch, Subject, refuse_never
from quantcli.types import Matrix

KIND = "MXFP4"
GROUP = 32
_BLOCK_BYTES = 17


class MicroCodes:
    """A `CodeSource` whose "scales" are the exponents' bytes, as numbers."""

    def __init__(self, view: CheckpointView) -> None:
        self._view = view

    def __call__(self, matrix: Matrix, start: int, rows: NDArray[Any]) -> IntegerCodes:
        """The codes of the stored ``rows`` of ``matrix`` from ``start`` on."""
        first = matrix.first + start
        raw = self._view.read_held(matrix.source, first, first + len(rows))
        blocks = raw.reshape(-1, _BLOCK_BYTES)
        codes = split_nibbles(blocks[:, 1:]).astype(np.uint8).reshape(len(rows), -1)
        exponents = blocks[:, 0].astype(np.float32).reshape(len(rows), -1)
        return IntegerCodes(codes, exponents)


def encode(rows: NDArray[Any]) -> NDArray[np.uint8] | None:
    """Rows that lie on an MXFP4 grid as GGUF's blocks; None when they do not.

    The encoder takes the exponent from the largest weight, which may be lower than the stored
    one, but then every weight is on that finer grid as well.
    """
    fmt = get_format(KIND)
    packed = native.encode(fmt, rows)
    return packed if np.array_equal(native.decode(fmt, packed), rows) else None


def _declare(matrix: Matrix, grid: IntegerGrid) -> list[Declared]:
    return [
        Declared(f"{matrix.module}.weight_packed", "U8", (matrix.rows, matrix.columns // 2)),
        Declared(f"{matrix.module}.weight_scale", "U8", (matrix.rows, matrix.columns // GROUP)),
    ]


def _place(matrix: Matrix, grid: IntegerGrid, start: int, coded: IntegerCodes) -> Iterator[Patch]:
    pairs = coded.codes[:, 0::2] | coded.codes[:, 1::2] << np.uint8(4)
    yield Patch(f"{matrix.module}.weight_packed", pairs, start)
    yield Patch(f"{matrix.module}.weight_scale", coded.scales.astype(np.uint8), start)


def _describe(subject: Subject) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
    }
    form = "mxfp4-pack-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": form}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(subject.kept),
            "kv_cache_scheme": None,
        }
    }


PACKED = Packing(_declare, _place, _describe, refuse_never)
