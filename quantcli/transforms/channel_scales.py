"""From one scale for each channel of a fold group to operations on the group's tensors.

Consumers' columns are multiplied by the scale and producers' rows divided by it, so each channel
arrives as it was. Query heads that share a key-value head share its scales; each expert has its
own where the channels are inside the experts, and all experts one where a norm feeds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs import find_folds
from quantcli.archs.fold import FoldGroup, fold_groups
from quantcli.model import Model
from quantcli.transforms.spec import Operation
from quantcli.types import OutputTensor


def model_groups(model: Model) -> list[FoldGroup]:
    """The fold groups of ``model``; ArchitectureError when its family declares none.

    Not those of multi-token prediction, whose inputs nobody sees.
    """
    unseen = {tensor.name for tensor in model.mtp_tensors}
    groups = fold_groups(find_folds(model.arch), model.arch, model.metadata, model.tensors)
    return [group for group in groups if group.producers[0].tensor not in unseen]


def spread(group: FoldGroup, scales: NDArray[Any]) -> NDArray[Any]:
    """A value for each column of the consumers, (matrices, columns), from one for each channel.

    ``scales`` has shape (matrices, channels).
    """
    heads = scales.reshape(len(scales), group.heads, 1, -1)
    return np.repeat(heads, group.sharers, axis=2).reshape(len(scales), -1)


def collect(group: FoldGroup, columns: NDArray[Any], how: Any) -> NDArray[Any]:
    """A value for each channel, (matrices, channels), from one for each of the consumers' columns.

    ``columns`` has shape (matrices, columns); ``how`` is a NumPy reduction such as np.max over
    the query heads that share a channel.
    """
    heads = columns.reshape(len(columns), group.heads, group.sharers, -1)
    return np.asarray(how(heads, axis=2)).reshape(len(columns), -1)


def scale_group(
    group: FoldGroup, scales: NDArray[Any], tensors: Mapping[str, OutputTensor]
) -> dict[str, Operation]:
    """Operations that scale the consumers' columns by ``scales`` and the producers inversely.

    ``scales`` has shape (matrices, channels) and is positive; ``tensors`` are the model's.
    """
    found = np.asarray(scales, np.float32)
    inverse = np.float32(1) / found
    operations = {}
    for producer in group.producers:
        tensor = tensors[producer.tensor]
        if len(tensor.shape) == 1:
            factors = np.ones(tensor.columns, np.float32)
            factors[producer.first : producer.last] = inverse[0]
            operations[producer.tensor] = Operation(columns=factors)
        else:
            factors = np.ones((group.matrices, tensor.rows // group.matrices), np.float32)
            factors[:, producer.first : producer.last] = inverse
            operations[producer.tensor] = Operation(rows=factors.reshape(-1))
    columns = spread(group, found)
    for name in group.consumers:
        operations[name] = Operation(columns=columns if group.matrices > 1 else columns[0])
    return operations
