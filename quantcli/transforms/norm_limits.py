"""Scales that a norm can hold: a folder's norms are stored in the checkpoint's own dtype.

Eight bits of bfloat16 round a norm's weight by up to 0.4 %, which would be an error in all that
reads the channel. But any scale near the one that was found serves as well, so each is moved to
the one that makes the stored weight exact, and the consumers' columns follow it. Gemma stores what
is added to one, which rounds coarsely where the sum is small; the scale moves further there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from quantcli.archs.fold import FoldGroup
from quantcli.formats.base import Floats
from quantcli.layouts.base import DTYPES
from quantcli.model import Model
from quantcli.transforms.channel_scales import model_groups
from quantcli.transforms.spec import Operation, TransformSpec
from quantcli.types import OutputTensor


def fit_norms(model: Model, transform: TransformSpec, dtypes: Mapping[str, str]) -> TransformSpec:
    """``transform`` of ``model``, its scales behind norms moved to what the norms can hold.

    ``dtypes`` are those that stored tensors will be written in ("BF16", "F16", "F32"), by name. A
    channel whose weight would vanish keeps its scale of one.
    """
    tensors = {tensor.name: tensor for tensor in model.tensors}
    operations = dict(transform.operations)
    for group in model_groups(model):
        if group.kind != "norm":
            continue
        norm = tensors[group.producers[0].tensor]
        operation = operations.get(norm.name)
        if operation is None or operation.columns is None or not norm.pieces:
            continue
        dtype = dtypes.get(norm.pieces[0].source, "F32")
        if dtype != "F32":
            factors = _held(model.read_floats(norm, 0, 1)[0], operation.columns, norm, dtype)
            operations |= _moved(group, operations, operation.columns, factors)
    return replace(transform, operations=operations)


def _held(weights: Floats, factors: Floats, norm: OutputTensor, dtype: str) -> Floats:
    """Factors near ``factors`` whose products with the weights are exact in ``dtype``."""
    piece = norm.pieces[0]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        stored: NDArray[np.generic] = piece.undo(weights * factors).astype(DTYPES[dtype])
        held = piece.apply(stored.astype(np.float32))
        found = held / weights
    usable = np.isfinite(found) & (found > 0)
    return np.where(usable, found, np.where(weights == 0, factors, np.float32(1)))


def _moved(
    group: FoldGroup, operations: Mapping[str, Operation], before: Floats, after: Floats
) -> dict[str, Operation]:
    moved = {}
    for producer in group.producers:
        moved[producer.tensor] = replace(operations[producer.tensor], columns=after)
    for name in group.consumers:
        columns = operations[name].columns
        if columns is not None:
            moved[name] = replace(
                operations[name], columns=np.asarray(columns * (before / after), np.float32)
            )
    return moved
