"""Layers that look tokens up, and share keys and values: each window has its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.tiny_models import MODELS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from quantcli.layerwise.hidden_states import HiddenStateCache, LayerInputs  # noqa: E402
from quantcli.layerwise.layerwise_model import LayerwiseModel  # noqa: E402
from quantcli.layerwise.walk import LayerWalk, run_silently  # noqa: E402
from quantcli.model import open_model  # noqa: E402

WINDOWS: NDArray[np.int32] = np.random.default_rng(0).integers(2, 4000, (3, 40), np.int32)
NAMES = ("gemma4-small", "gemma3n")


def _model(folder: Path) -> LayerwiseModel:
    model = open_model(folder, vocabulary=False)
    return LayerwiseModel(model, model.config)


def _reference(folder: Path, name: str) -> torch.nn.Module:
    return getattr(transformers, MODELS[name].model).from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_every_windows_logits_are_transformers(name: str, checkpoint: Callable[..., Path]) -> None:
    model, reference = _model(checkpoint(name)), _reference(checkpoint(name), name)
    states = HiddenStateCache((*WINDOWS.shape, model.hidden_size), torch.float32)
    walk = LayerWalk(model, WINDOWS, states)
    run_silently(walk.forward())
    with walk.head(weights=True):
        for number, ids in enumerate(WINDOWS):
            with torch.no_grad():
                wanted = reference(torch.tensor(ids[None]).long()).logits[0].numpy()
            found = model.logits(model.finish(walk.get(number)))[0].numpy()
            assert np.abs(found - wanted).max() < 1e-4 * wanted.std()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_go_back_through_what_is_shared(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    model, reference = _model(checkpoint(name)), _reference(checkpoint(name), name)
    layers = len(model.layers)
    values = np.zeros((layers + 1, *WINDOWS.shape, model.hidden_size), np.float32)
    states = LayerInputs(values, torch.float32)
    walk = LayerWalk(model, WINDOWS, states, label=None)
    run_silently(walk.forward())
    weight = torch.randn(WINDOWS.shape[1], model.hidden_size)
    for window in walk.windows:
        states.replace(window, weight[None])
    run_silently(walk.backward())
    decoder = reference.get_decoder()
    for number, ids in enumerate(WINDOWS):
        leaves: list[torch.Tensor] = []

        def begin(module: object, inputs: tuple[torch.Tensor, ...], leaves=leaves):
            leaves.append(inputs[0].detach().clone().requires_grad_(True))
            return (leaves[0], *inputs[1:])

        hooks = [decoder.layers[0].register_forward_pre_hook(begin)]
        last: list[torch.Tensor] = []
        hooks.append(
            decoder.layers[-1].register_forward_hook(
                lambda module, inputs, output, last=last: last.append(output)
            )
        )
        reference(torch.tensor(ids[None]).long(), use_cache=False)
        for hook in hooks:
            hook.remove()
        output = last[0][0] if isinstance(last[0], tuple) else last[0]
        (model.join(output) * weight).sum().backward()
        wanted = model.join(leaves[0].grad)[0].numpy()
        assert np.abs(values[0, number] - wanted).max() < 1e-4 * np.abs(wanted).max()
