"""The real llama.cpp's quantizer over whole models, through llama-cpp-python."""

import ctypes
import struct
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

FILE_TYPES = {
    name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_"): value
    for name, value in vars(llama_cpp).items()
    if name.startswith("LLAMA_FTYPE_")
}


def read_dat(path: Path) -> dict[str, NDArray[np.float32]]:
    """A legacy importance matrix, as llama-quantize reads it: values / calls."""
    raw = path.read_bytes()
    (count,) = struct.unpack_from("<i", raw)
    place, entries = 4, {}
    for _ in range(count):
        (length,) = struct.unpack_from("<i", raw, place)
        name = raw[place + 4 : place + 4 + length].decode()
        place += 4 + length
        calls, values = struct.unpack_from("<ii", raw, place)
        data = np.frombuffer(raw, "<f4", values, place + 8)
        entries[name] = data / np.float32(calls) if calls > 0 else data
        place += 8 + 4 * values
    return entries


def llama_quantize(
    source: Path,
    output: Path,
    type_name: str,
    *,
    imatrix: Path | dict[str, NDArray[np.float32]] | None = None,
    **flags: object,
) -> None:
    """Quantize a GGUF file; ``flags`` are fields of llama_model_quantize_params."""
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[type_name]
    params.nthread = 2
    for name, value in flags.items():
        setattr(params, name, value)
    entries = read_dat(imatrix) if isinstance(imatrix, Path) else imatrix or {}
    kept = [np.ascontiguousarray(values, dtype=np.float32) for values in entries.values()]
    rows = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))()
    for row, name, values in zip(rows, entries, kept, strict=False):
        row.name = name.encode()
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        row.size = values.size
    if entries:
        params.imatrix = rows
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(output).encode(), ctypes.byref(params)
    )
    if code != 0:
        raise RuntimeError(f"llama_model_quantize returned {code}")
