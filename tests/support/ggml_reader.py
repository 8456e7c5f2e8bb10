"""llama.cpp's own GGUF reader and type table, called through libggml-base: the oracle."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from support import ggml


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@cache
def _library() -> ctypes.CDLL:
    lib = ggml.library()
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    lib.gguf_free.argtypes = [ctypes.c_void_p]
    lib.ggml_type_name.restype = ctypes.c_char_p
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_blck_size.restype = ctypes.c_int64
    for function in (lib.ggml_type_name, lib.ggml_type_size, lib.ggml_blck_size):
        function.argtypes = [ctypes.c_int]
    return lib


def accepts(path: Path) -> bool:
    """Whether llama.cpp reads the head of that GGUF file."""
    lib = _library()
    context = lib.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    if context:
        lib.gguf_free(context)
    return bool(context)


def type_traits(type_id: int) -> tuple[str, int, int]:
    """Name, weights in a block and bytes of a block of a ggml type."""
    lib = _library()
    name = lib.ggml_type_name(type_id).decode()
    return name, lib.ggml_blck_size(type_id), lib.ggml_type_size(type_id)
