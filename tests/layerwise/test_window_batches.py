"""Windows that go through a layer at once: the same states, and only where that holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch

from quantcli.layerwise.hidden_states import HiddenStateCache
from quantcli.layerwise.input_hooks import MatmulInput
from quantcli.layerwise.layerwise_model import LayerwiseModel
from quantcli.layerwise.walk import LayerPass, LayerWalk, run_silently
from quantcli.layerwise.window_batches import batch_size, cut_batches, runs_batched
from quantcli.model import Model, open_model


def test_only_an_accelerator_takes_several_windows() -> None:
    assert batch_size(torch.device("cpu"), 512) == 1
    assert batch_size(torch.device("meta"), 512) == 8
    assert batch_size(torch.device("meta"), 10000) == 1


def test_windows_go_together_that_may_be_told_as_one() -> None:
    found = list(cut_batches(range(10), 3, lambda number: number % 8 == 7))
    assert found == [[0, 1, 2], [3, 4, 5], [6], [7], [8, 9]]


@pytest.mark.parametrize(
    ("run", "holds"),
    [
        (lambda hidden: hidden * 2, True),
        (lambda hidden: hidden + hidden.mean(), False),
        (lambda hidden: hidden[:1], False),
        (lambda hidden: hidden.reshape(1, 3, 4) * 2, False),
        (lambda hidden: hidden * torch.nan, False),
    ],
)
def test_a_layer_that_mixes_windows_takes_them_one_by_one(
    run: Callable[[torch.Tensor], torch.Tensor], holds: bool
) -> None:
    one, other = torch.ones(1, 3, 4), torch.full((1, 3, 4), 5.0)
    assert runs_batched(run, one, other) == holds


def test_no_memory_is_an_error() -> None:
    def run(hidden: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        runs_batched(run, torch.ones(1, 3, 4), torch.ones(1, 3, 4))


def _walk(model: Model, batch: int) -> tuple[list[torch.Tensor], list[int], int]:
    """All windows' states after the first layer, which were told of, and how many rows."""
    layers = LayerwiseModel(model, model.config)
    ids = np.random.default_rng(1).integers(2, 900, (7, 12)).astype(np.int32)
    states = HiddenStateCache((*ids.shape, layers.hidden_size), layers.dtype)
    walk = LayerWalk(layers, ids, states)
    walk.batch = batch
    walk.embed()
    told: list[int] = []
    rows = 0

    def see(product: MatmulInput) -> None:
        nonlocal rows
        rows += len(product.rows)

    def observe(number: int) -> Callable[[MatmulInput], None]:
        told.append(number)
        return see

    def visit(layer: LayerPass) -> object:
        return layer.forward(observe, together=lambda number: number == 3)

    run_silently(walk.layer(0, visit))
    return [states.get(number) for number in walk.windows], told, rows


def test_batches_give_the_states_and_inputs_of_single_windows(mini: Path) -> None:
    with open_model(mini) as model:
        single, told, rows = _walk(model, 1)
        batched, first, seen = _walk(model, 2)
    assert told == list(range(7))
    assert first == [0, 2, 3, 4, 6]
    assert seen == rows > 0
    for want, found in zip(single, batched, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
