"""Rotation: spread outlier channels over all others, offline, in the weights alone.

RMSNorm commutes with any rotation of the residual stream once its weights are ones. So each norm's
weights go into the matrices that read it, everything that reads the stream is rotated along its
columns, and everything that writes to it along its rows, the embeddings included; a tied head
becomes a separate tensor, since the final norm's weights are in it. Attention's values are rotated
within each head, and undone in the columns of the output matrix.

Refused where the function would change: LayerNorm, norms after attention or MLP. Rotations that
must be computed at inference (before the MLP's last product, within the KV cache) are not done: the
file stays a standard one. Sources: QuaRot (arXiv:2404.00456), SpinQuant (arXiv:2405.16406).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from quantcli.archs import find_folds
from quantcli.archs.fold import FoldGroup, is_prediction, writer_tensors
from quantcli.errors import ArchitectureError
from quantcli.model import Model
from quantcli.statistics.input_statistics import InputStatistics
from quantcli.transforms.base import TransformFound, TransformOptions
from quantcli.transforms.channel_scales import model_groups
from quantcli.transforms.orthogonal import Rotation, make_rotation
from quantcli.transforms.output_error import RoundRows
from quantcli.transforms.spec import Operation, RotationRef, TransformSpec
from quantcli.types import Event, OutputTensor

_STREAM, _HEAD = "stream", "head"
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


def rotate(model: Model, *, seed: int = 0, heads: bool = True) -> TransformSpec:
    """The transform that rotates the residual stream, and each head's values if ``heads``.

    Only norms are read. ArchitectureError where the model's function would not be preserved.
    """
    folds = find_folds(model.arch)
    ROTATE.check(model, ())
    tensors = {tensor.name: tensor for tensor in model.tensors}
    groups = model_groups(model)
    stream = make_rotation(tensors[_EMBEDDING].columns, seed)
    rotations: dict[str, Rotation] = {_STREAM: stream}
    turn = RotationRef(_STREAM, 0, stream.size)
    operations: dict[str, Operation] = {}
    for group in groups:
        if group.stream:
            operations |= _read_stream(model, group, tensors, turn)
    operations |= _untie(model, tensors, folds.final_norm, turn)
    for name in writer_tensors(folds, model.tensors, model.count("block_count")):
        tensor = tensors[name]
        if name == _EMBEDDING or len(tensor.shape) == 1:
            operations[name] = Operation(columns_rotation=turn)
        else:
            operations[name] = Operation(rows_rotation=RotationRef(_STREAM, 0, tensor.rows))
    if heads:
        for group in groups:
            if group.kind == "values":
                _turn_values(group, tensors, operations, rotations, seed)
    settings = {"seed": seed, "heads": heads}
    return TransformSpec("rotate", operations, rotations, settings)


class _Rotate:
    """Rotation as a `Transform`."""

    name = "rotate"
    options = ("seed",)
    needs = ()

    def check(self, model: Model, earlier: Sequence[str]) -> None:
        """ArchitectureError where a rotation of the stream would change the model's function."""
        folds = find_folds(model.arch)
        if folds.basis:
            raise ArchitectureError(
                f"{model.label} ({model.arch}) cannot be rotated, because {folds.basis}",
                hint="awq and smoothquant, which scale channels, fit it",
            )
        if any(is_prediction(tensor.name) for tensor in model.tensors):
            raise ArchitectureError(
                f"{model.label} ({model.arch}) cannot be rotated, because its block for "
                "multi-token prediction reads what the head reads, behind the final norm",
                hint="--no-mtp leaves the block out; awq and smoothquant fit it as it is",
            )

    def find(
        self, model: Model, grids: Mapping[str, RoundRows], statistics: InputStatistics,
        options: TransformOptions,
    ) -> Iterator[Event]:  # fmt: skip
        """Yield `TransformFound`; only norms are read."""
        yield TransformFound(rotate(model, seed=options.seed))


ROTATE = _Rotate()


def _read_stream(
    model: Model, group: FoldGroup, tensors: Mapping[str, OutputTensor], turn: RotationRef
) -> dict[str, Operation]:
    """The norm's weights move into its consumers, whose columns are then rotated."""
    (producer,) = group.producers
    norm = model.read_floats(tensors[producer.tensor], 0, 1)[0]
    folded = {name: Operation(columns=norm, columns_rotation=turn) for name in group.consumers}
    return {**folded, producer.tensor: Operation(values=np.ones(norm.shape, np.float32))}


def _untie(
    model: Model, tensors: Mapping[str, OutputTensor], final: str, turn: RotationRef
) -> dict[str, Operation]:
    """A separate head for a model whose head is the embeddings."""
    if _OUTPUT in tensors:
        return {}
    norm = model.read_floats(tensors[final], 0, 1)[0]
    return {
        _OUTPUT: Operation(columns=norm, columns_rotation=turn, source=_EMBEDDING),
        final: Operation(values=np.ones(norm.shape, np.float32)),
    }


def _turn_values(
    group: FoldGroup,
    tensors: Mapping[str, OutputTensor],
    operations: dict[str, Operation],
    rotations: dict[str, Rotation],
    seed: int,
) -> None:
    """Every head's values by the same rotation, undone where the output matrix reads them."""
    size = group.channels // group.heads
    name = f"{_HEAD}.{size}"
    rotations.setdefault(name, make_rotation(size, seed))
    for producer in group.producers:
        turn = RotationRef(name, producer.first, producer.last)
        before = operations.get(producer.tensor, Operation())
        if len(tensors[producer.tensor].shape) == 1:
            operations[producer.tensor] = replace(before, columns_rotation=turn)
        else:
            operations[producer.tensor] = replace(before, rows_rotation=turn)
    for consumer in group.consumers:
        turn = RotationRef(name, 0, tensors[consumer].columns)
        operations[consumer] = replace(operations.get(consumer, Operation()), columns_rotation=turn)
