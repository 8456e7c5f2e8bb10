"""Scales for every fold group that would show any fault."""

from __future__ import annotations

import numpy as np

from quantcli.methods.folding import model_groups, scale_group
from quantcli.methods.transform import Transform, merge_scales
from quantcli.model import Model


def random_folds(model: Model, seed: int = 0) -> Transform:
    """Scales from 1/8 to 8 for every channel of every group."""
    draws = np.random.default_rng(seed)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    parts = []
    for group in model_groups(model):
        scales = np.exp2(draws.uniform(-3, 3, (group.matrices, group.channels)))
        parts.append(scale_group(group, scales, tensors))
    return Transform("random", merge_scales(parts))
