"""A checkpoint turned into a GGUF by plain means: an architecture's tables, NumPy, gguf's writer.

Nothing of quantcli but the tables takes part, so a wrong table cannot hide behind a reader's or
a writer's mistake.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from quantcli.archs import find_architecture
from quantcli.types import OutputTensor, TensorInfo

_KINDS = {
    "array": gguf.GGUFValueType.ARRAY,
    "u32": gguf.GGUFValueType.UINT32,
    "i32": gguf.GGUFValueType.INT32,
    "f32": gguf.GGUFValueType.FLOAT32,
    "bool": gguf.GGUFValueType.BOOL,
    "str": gguf.GGUFValueType.STRING,
}
_ALWAYS_F32 = (
    "position_embd.weight",
    "ffn_gate_inp.weight",
    "_norm.weight",
    "altup_correct_coef.weight",
    "altup_predict_coef.weight",
    "conv.weight",
    "conv1d.weight",
    "ssm_a",
    "ssm_d",
)


def read_config(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


def read_stored(folder: Path) -> tuple[dict[str, TensorInfo], dict[str, NDArray[np.float32]]]:
    """Every tensor of the folder's model.safetensors: its header and its values."""
    import torch
    from safetensors import safe_open

    path = folder / "model.safetensors"
    infos, arrays = {}, {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            tensor = file.get_tensor(name)
            dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
            infos[name] = TensorInfo(name, tuple(tensor.shape), dtype, tensor.nbytes, path)
            arrays[name] = tensor.float().numpy()
    return infos, arrays


@dataclass(frozen=True)
class Stored:
    """Stored tensors in memory, as a `TensorStore`."""

    tensors: Mapping[str, TensorInfo]
    arrays: Mapping[str, NDArray[np.float32]]

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        found = self.arrays[name]
        return found.reshape(-1, found.shape[-1] if found.ndim else 1)[start:stop]

    def read_columns(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        return np.ascontiguousarray(self.arrays[name][:, start:stop].T)

    def close(self) -> None:
        """Nothing is held."""


def materialise(
    tensor: OutputTensor, arrays: Mapping[str, NDArray[np.float32]]
) -> NDArray[np.float32]:
    """The values of an output tensor, as its pieces describe them."""
    if tensor.values is not None:
        return tensor.values
    parts = [piece.gather(arrays[piece.source]) for piece in tensor.pieces]
    return np.ascontiguousarray(np.concatenate(parts).reshape(tensor.shape))


def write_model(folder: Path, path: Path, *, dtype: str) -> Path:
    """Convert the checkpoint in ``folder``; matrices become ``dtype``, "F32" or "BF16"."""
    config = read_config(folder)
    architecture = find_architecture(config)
    infos, arrays = read_stored(folder)
    writer = gguf.GGUFWriter(path, architecture.name)
    for key, value in architecture.metadata(config, Stored(infos, arrays)).items():
        kind, sub = value.kind, None
        if kind.startswith("["):
            kind, sub = "array", _KINDS[kind[1:-1]]
        writer.add_key_value(key, value.value, _KINDS[kind], sub)
    _add_vocabulary(writer, folder)
    for tensor in architecture.tensors(config, infos):
        values = materialise(tensor, arrays)
        kind = gguf.GGMLQuantizationType.F32
        matrix = values.ndim > 1 and tensor.name.endswith(".weight")
        if matrix and not tensor.name.endswith(_ALWAYS_F32):
            kind = gguf.GGMLQuantizationType[dtype]
        if kind != gguf.GGMLQuantizationType.F32:
            values = gguf.quants.quantize(values, kind)
        writer.add_tensor(tensor.name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(names)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if n in special else gguf.TokenType.NORMAL for n in names]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
