"""Logits of a model, transformed or not, in transformers' own modules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.model import Model


def read_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def transformers_logits(model: Model, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits after each of ``ids``, (tokens, vocabulary), computed in float64.

    So what differs between two models is their weights' float32, not the products' order.
    """
    import torch

    from quantcli.layerwise.layerwise_model import LayerwiseModel

    layers = LayerwiseModel(model, model.config, dtype=torch.float64)
    with layers.start() as start:
        hidden, calls = start.embed(ids), start.calls(ids)
    for index, call in enumerate(calls):
        with layers.filled(layers.layer_parameters(index)):
            hidden = layers.run(index, hidden, call)
    with layers.filled([*layers.outside_layers(), layers.head_name]):
        logits: NDArray[np.float32] = layers.logits(layers.finish(hidden))[0].numpy()
    return logits
