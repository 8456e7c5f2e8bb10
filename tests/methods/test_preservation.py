"""Every transform leaves every architecture's function alone, in transformers and in llama.cpp.

Scales are random and far from one, so a channel that is scaled once and not undone, or tied to
the wrong head, shows at once. What remains is float32's rounding of the changed weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.tiny_models import MODELS
from support.transformed_logits import transformers_logits

from quantcli.methods.folding import model_groups, scale_group
from quantcli.methods.transform import Transform, merge_scales
from quantcli.methods.transformed import apply_transform
from quantcli.model import Model, open_model

pytest.importorskip("torch")

IDS = np.random.default_rng(0).integers(2, 4000, 40).tolist()
NOISE = 2e-5
"""Of the logits' deviation; measured: 2e-6 in the median model, GELU and experts included."""


def random_folds(model: Model, seed: int = 0) -> Transform:
    """Scales from 1/8 to 8 for every channel of every group."""
    draws = np.random.default_rng(seed)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    parts = []
    for group in model_groups(model):
        scales = np.exp2(draws.uniform(-3, 3, (group.matrices, group.channels)))
        parts.append(scale_group(group, scales, tensors))
    return Transform("random", merge_scales(parts))


@pytest.mark.parametrize("name", MODELS)
def test_folding_every_group_keeps_the_logits_of_transformers(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    with open_model(checkpoint(name), vocabulary=False) as model:
        transform = random_folds(model)
        changed = apply_transform(model, transform)
        expected, found = (transformers_logits(one, IDS) for one in (model, changed))
    assert expected.std() > 1, "flat logits would hide a fault"
    assert np.abs(found - expected).max() / expected.std() < NOISE
