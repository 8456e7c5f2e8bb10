"""The real llama.cpp's decisions about whole models, without quantizing: its dry run.

llama_model_quantize with dry_run reads headers only, so the models here are GGUF files with a true
header and a hole where the weights would be. What it decides is in its log, one line per tensor in
the order in which it would write them.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from llama_cpp._logger import llama_log_callback as usual_callback
from support.llama_quantize import FILE_TYPES

from quantcli.pieces import Piece
from quantcli.types import MetaValue, OutputTensor

GGML = {name: int(member) for name, member in gguf.GGMLQuantizationType.__members__.items()}
_LINE = re.compile(
    r"^\[ *\d+/ *\d+\] (\S+) +- \[[^]]*\], type = +(\S+), size = .*? MiB(?: \((\S+)\))?$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Shape:
    """A model as far as a plan sees it: key-values without the architecture's prefix, tensors."""

    arch: str
    keys: Mapping[str, int | float | Sequence[int]]
    tensors: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "F32"

    def metadata(self) -> dict[str, MetaValue]:
        found = {"general.architecture": MetaValue("str", self.arch)}
        for key, value in self.keys.items():
            kind = "f32" if isinstance(value, float) else "u32"
            kind = "bool" if isinstance(value, bool) else kind
            name = f"{self.arch}.{key}"
            found[name] = MetaValue(f"[{kind}]" if isinstance(value, list) else kind, value)
        return found

    def output_tensors(self) -> list[OutputTensor]:
        return [
            OutputTensor(name, shape, self.dtypes.get(name, self.dtype), (Piece(name, 1),))
            for name, shape in self.tensors.items()
        ]


def write_hollow(path: Path, model: Shape) -> Path:
    """A GGUF of that shape whose weights are a hole in the file."""
    writer = gguf.GGUFWriter(path, model.arch)
    for key, value in model.keys.items():
        name = f"{model.arch}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    total = 0
    for name, shape in model.tensors.items():
        kind = gguf.GGMLQuantizationType[model.dtypes.get(name, model.dtype)]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(shape)) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        total += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = -(-path.stat().st_size // 32) * 32
    with path.open("r+b") as file:
        file.truncate(header + total)
    return path


def dry_run(
    path: Path,
    type_name: str,
    *,
    imatrix: Mapping[str, int] | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    leave_output_tensor: bool = False,
    pure: bool = False,
    override_kv: Mapping[str, int] | None = None,
) -> list[tuple[str, str]]:
    """Name and type of every tensor, in the order in which llama-quantize writes them.

    ``imatrix`` maps entries to their lengths; ``tensor_types`` are (expression, type).
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[type_name]
    params.dry_run = True
    params.allow_requantize = True
    params.nthread = 1
    params.pure = pure
    params.quantize_output_tensor = not leave_output_tensor
    if output_tensor_type:
        params.output_tensor_type = GGML[output_tensor_type]
    if token_embedding_type:
        params.token_embedding_type = GGML[token_embedding_type]
    if tensor_types:
        overrides = (llama_cpp.llama_model_tensor_override * (len(tensor_types) + 1))()
        for row, (pattern, name) in zip(overrides, tensor_types, strict=False):
            row.pattern, row.type = pattern.lower().encode(), GGML[name]
        params.tt_overrides = overrides
    if override_kv:
        keys = (llama_cpp.llama_model_kv_override * (len(override_kv) + 1))()
        for line, (key, number) in zip(keys, override_kv.items(), strict=False):
            line.tag, line.key = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, key.encode()
            line.value.val_i64 = number
        params.kv_overrides = keys
    if imatrix:
        rows = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
        values = np.ones(max(imatrix.values()), np.float32)
        for entry, (name, size) in zip(rows, imatrix.items(), strict=False):
            entry.name, entry.size = name.encode(), size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = rows

    log: list[bytes] = []
    capture = llama_cpp.llama_log_callback(lambda level, text, user: log.append(text))
    llama_cpp.llama_log_set(capture, ctypes.c_void_p(0))
    try:
        code = llama_cpp.llama_model_quantize(
            str(path).encode(), str(path.with_suffix(".out")).encode(), ctypes.byref(params)
        )
    finally:
        llama_cpp.llama_log_set(usual_callback, ctypes.c_void_p(0))
    text = b"".join(log).decode()
    if code != 0:
        raise RuntimeError(text)
    return [(name, (new or old).upper()) for name, old, new in _LINE.findall(text)]
