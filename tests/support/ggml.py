"""The real llama.cpp's block encoder, called on plain arrays: the oracle for bytes.

`ggml_quantize_chunk` lives in the libggml-base that llama-cpp-python installs.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import pytest


@cache
def library() -> ctypes.CDLL:
    package = pytest.importorskip("llama_cpp", reason="llama-cpp-python is the oracle for bytes")
    lib = ctypes.CDLL(str(Path(package.__file__).parent / "lib" / "libggml-base.so"))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_row_size.restype = ctypes.c_size_t
    lib.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    return lib


class _Traits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h, up to what is needed."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def dequantize(type_id: int, packed: np.ndarray) -> np.ndarray:
    """llama.cpp's float32 for packed rows; F32 itself has no decoder there."""
    lib = library()
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    found = lib.ggml_get_type_traits(type_id).contents
    columns = packed.shape[1] // found.type_size * found.blck_size
    packed = np.ascontiguousarray(packed)
    out = np.empty((len(packed), columns), np.float32)
    found.to_float(packed.ctypes.data, out.ctypes.data, out.size)
    return out


def quantize(
    type_id: int, rows: np.ndarray, importance: np.ndarray | None, out: np.ndarray | None = None
) -> np.ndarray:
    """llama.cpp's bytes for float32 rows: uint8 of shape (n, row bytes), in ``out`` when given."""
    lib = library()
    lib.ggml_quantize_init(type_id)
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    nrows, ncols = rows.shape
    if out is None:
        out = np.zeros((nrows, lib.ggml_row_size(type_id, ncols)), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    written = lib.ggml_quantize_chunk(
        type_id,
        rows.ctypes.data,
        out.ctypes.data,
        0,
        nrows,
        ncols,
        None if weights is None else weights.ctypes.data,
    )
    assert written == out.nbytes
    return out
