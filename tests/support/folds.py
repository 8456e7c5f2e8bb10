"""Scales and orders for every fold group that would show any fault."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from quantcli.model import Model
from quantcli.transforms.channel_scales import model_groups, scale_group
from quantcli.transforms.orthogonal import Permutation
from quantcli.transforms.reorder import turn_channels
from quantcli.transforms.spec import Operation, TransformSpec, merge_scales


def random_folds(model: Model, seed: int = 0) -> TransformSpec:
    """Scales from 1/8 to 8 for every channel of every group."""
    draws = np.random.default_rng(seed)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    parts = []
    for group in model_groups(model):
        scales = np.exp2(draws.uniform(-3, 3, (group.matrices, group.channels)))
        parts.append(scale_group(group, scales, tensors))
    return TransformSpec("random", merge_scales(parts))


def random_orders(model: Model, seed: int = 0) -> TransformSpec:
    """The same, and another order of the channels of every MLP where one may be."""
    draws = np.random.default_rng(seed + 1)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    operations = dict(random_folds(model, seed).operations)
    orders = {}
    for group in model_groups(model):
        if turns := turn_channels(group, tensors):
            orders[group.name] = Permutation(draws.permutation(group.channels))
            for name, turn in turns.items():
                scaled = operations.get(name, Operation())
                operations[name] = replace(
                    scaled, columns_rotation=turn.columns_rotation, rows_rotation=turn.rows_rotation
                )
    return TransformSpec("random", operations, orders)
