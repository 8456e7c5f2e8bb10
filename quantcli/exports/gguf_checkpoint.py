"""A GGUF as the checkpoint it was made from: tensors under their stored names, in stored order.

The architecture's table says which rows of which GGUF tensor came from which stored tensor; read
backwards, it undoes permuted heads, stacked experts, transposed weights and shifted norms. Rows
come slab by slab, decoded by our kernels, so that no tensor need be in memory as a whole.

Refused: a GGUF that lacks a tensor which its table knows, holds one in another shape, or has one
that the table does not know.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs import find_architecture, rebuild_config
from quantcli.checkpoint_view import CheckpointView, find_uses
from quantcli.errors import ArchitectureError, UnknownArchitectureError
from quantcli.formats import FORMATS, get_format, native
from quantcli.model import Model
from quantcli.sources.hf import read_config
from quantcli.tensor_scales import multiply_scales
from quantcli.types import OutputTensor, TensorInfo, row_count


def view_checkpoint(model: Model, config: Mapping[str, Any]) -> CheckpointView:
    """The stored tensors of the GGUF ``model``, which ``config`` describes (config.json).

    They come in the order of the architecture's table; their dtype is the GGUF tensor's and their
    size what the GGUF spends on them. Rows have the GGUF's dtype where that is a float, else
    float32.
    """
    try:
        architecture = find_architecture(config)
    except UnknownArchitectureError as unknown:
        raise ArchitectureError(
            f"nothing says what a checkpoint calls the tensors of {model.path}, since "
            f"{unknown.message}",
            hint="the checkpoint that it was made from needs no table",
        ) from unknown
    model = multiply_scales(model)
    present = {tensor.name: tensor for tensor in model.tensors}
    layout = {
        name: TensorInfo(name, shape, "F32", 4 * int(np.prod(shape)), model.path)
        for name, shape in architecture.stored(config, present).items()
    }
    known = architecture.tensors(config, layout)
    _refuse_others(model, {tensor.name for tensor in known})
    uses = find_uses(
        replace(_check(model.path, wanted, present), pieces=wanted.pieces) for wanted in known
    )
    tensors = dict(layout)
    for name, found in uses.items():
        held = present[found[0].tensor.name]
        nbytes = _share(model, held, layout[name])
        tensors[name] = replace(layout[name], dtype=held.dtype, nbytes=nbytes)
    keyed = {
        name: model.metadata[key].value[layer]
        for name, (key, layer) in architecture.key_places(config, layout).items()
    }
    return CheckpointView(
        tensors, uses, lambda tensor, *rows: model.read_rows(present[tensor.name], *rows), _decode,
        _Numbers({name: layout[name] for name in keyed}, keyed),
    )  # fmt: skip


@dataclass(frozen=True)
class _Numbers:
    """A `TensorStore` of tensors with one element, whose numbers are key-values of the GGUF."""

    tensors: Mapping[str, TensorInfo]
    numbers: Mapping[str, float]

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """The number; there is one row."""
        return np.full((1, 1), self.numbers[name], np.float32)

    read_columns = read_rows

    def close(self) -> None:
        """Nothing is held."""


def _share(model: Model, tensor: OutputTensor, info: TensorInfo) -> int:
    """What the GGUF spends on one of the stored matrices that ``tensor`` is made of."""
    whole = model.stored_bytes(tensor)
    return whole * row_count(info.shape[-2:]) * info.shape[-1] // max(1, tensor.elements)


def _decode(tensor: OutputTensor, rows: NDArray[Any]) -> NDArray[Any]:
    return native.decode(get_format(tensor.dtype), rows) if rows.dtype == np.uint8 else rows


def as_checkpoint(model: Model, config: Mapping[str, Any], view: CheckpointView) -> Model:
    """The GGUF ``model`` as the checkpoint that ``view`` shows, for what works on checkpoints.

    Its tensors' sizes are those of the float32 rows that are read, by which others cut slabs.
    """
    floats = {name: replace(i, nbytes=4 * i.elements) for name, i in view.tensors.items()}
    tensors = find_architecture(config).tensors(config, floats)
    return replace(
        model, tensors=tuple(tensors), store=replace(view, tensors=floats), from_gguf=False,
        config=config, notes=(),
    )  # fmt: skip


def find_config(model: Model, folder: Path | None = None) -> dict[str, Any]:
    """The config.json of a GGUF's model: rebuilt from its key-values, or that of ``folder``.

    What llama.cpp takes for granted of the architecture is written out, since not every reader
    assumes the same. Raises ArchitectureError when the key-values do not determine one.
    """
    if folder is not None:
        config = read_config(folder)
        if "text_config" in config:
            raise ArchitectureError(
                f"{folder}: config.json is of a model that does not only read text, but a GGUF "
                "holds the text model",
                hint="leave --config out",
            )
        return config
    tensors = {tensor.name: tensor for tensor in model.tensors}

    def read(name: str) -> NDArray[np.float32]:
        rows = model.read_rows(tensors[name], 0, tensors[name].rows)
        if rows.dtype != np.uint8:
            return rows.astype(np.float32, copy=False)
        return native.decode(get_format(tensors[name].dtype), rows)

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = rebuild_config(model.arch, model.metadata, shapes, read)
    fixed = find_architecture(config).fixed
    return {**{key: values[0] for key, values in fixed.items() if values}, **config}


def _refuse_others(model: Model, known: Container[str]) -> None:
    other = next((tensor.name for tensor in model.tensors if tensor.name not in known), None)
    if other is not None:
        raise ArchitectureError(
            f"{model.path} has the tensor {other}, which quantcli does not know in {model.arch} "
            "models, so a checkpoint without it would be another model"
        )


def _check(path: Path, wanted: OutputTensor, present: Mapping[str, OutputTensor]) -> OutputTensor:
    tensor = present.get(wanted.name)
    if tensor is None:
        raise ArchitectureError(f"{path} has no tensor {wanted.name}, which its model needs")
    if tensor.shape != wanted.shape:
        raise ArchitectureError(
            f"{path}: {tensor.name} has shape {tensor.shape}, expected {wanted.shape}"
        )
    if tensor.dtype not in FORMATS:
        raise ArchitectureError(
            f"{path}: {tensor.name} has type {tensor.dtype}, which quantcli cannot decode"
        )
    return tensor
