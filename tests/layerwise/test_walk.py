"""A walk visits each layer once, with that layer's weights alone in memory, forwards and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from quantcli.errors import SourceError
from quantcli.layerwise.hidden_states import HiddenStateCache, LayerInputs
from quantcli.layerwise.layerwise_model import LayerwiseModel
from quantcli.layerwise.walk import LayerPass, LayerWalk, run_silently
from quantcli.model import Model, open_model
from quantcli.types import Event, Progress

IDS = np.random.default_rng(0).integers(3, 200, (3, 20)).astype(np.int32)


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Iterator[Model]:
    with open_model(checkpoint("llama"), vocabulary=False) as opened:
        yield opened


def _cache(layers: LayerwiseModel) -> HiddenStateCache:
    return HiddenStateCache((*IDS.shape, layers.hidden_size), layers.dtype)


def test_one_layer_is_filled_at_a_time_and_the_logits_are_transformers(model: Model) -> None:
    layers = LayerwiseModel(model, model.config)
    walk = LayerWalk(layers, IDS, _cache(layers), task="a test, ")

    def visit(layer: LayerPass) -> Iterator[Event]:
        filled = [n for n, p in layers.module.named_parameters() if not p.is_meta]
        assert filled == list(layer.weights) == list(layer.names)
        yield from layer.forward()
        layer.release()
        assert all(parameter.is_meta for parameter in layers.module.parameters())

    walk.embed()
    events = [event for index in walk.layers for event in walk.layer(index, visit)]
    whole = layers.layer_starts[-1]
    assert events[-1] == Progress(whole, whole, "a test, layer 1")
    assert [e.done for e in events] == sorted({e.done for e in events})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    with walk.head(weights=True), torch.no_grad():
        for number in walk.windows:
            ours = layers.logits(layers.finish(walk.get(number)))
            wanted = theirs(torch.from_numpy(IDS[number : number + 1].astype(np.int64))).logits
            assert torch.allclose(ours, wanted, atol=1e-4)


def test_what_is_filled_is_not_read_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = LayerwiseModel(model, model.config)
    names = layers.layer_parameters(0)
    with layers.filled(names) as values:
        monkeypatch.setattr(layers.parameters, "read", pytest.fail)
        with layers.filled(names[:2]) as again:
            assert all(again[name] is values[name] for name in names[:2])
        assert not any(layers.module.get_parameter(name).is_meta for name in names)


def test_gradients_go_back_to_the_embedding(model: Model) -> None:
    layers = LayerwiseModel(model, model.config)
    values = np.zeros((len(layers.layers) + 1, *IDS.shape, layers.hidden_size), np.float32)
    walk = LayerWalk(layers, IDS, LayerInputs(values, layers.dtype), passes=2)
    forward = list(walk.forward())
    with walk.head(weights=True):
        for number in walk.windows:
            leaf = walk.get(number).requires_grad_(True)
            layers.scores(leaf).square().sum().backward()
            walk.states.replace(number, leaf.grad)
    events = [*forward, *walk.backward()]
    assert [e.done for e in events] == sorted(e.done for e in events)
    assert events[-1].done == events[-1].total
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    tokens = torch.from_numpy(IDS[1:2].astype(np.int64))
    embedded = theirs.get_input_embeddings()(tokens).detach().requires_grad_(True)
    theirs(inputs_embeds=embedded).logits.square().sum().backward()
    assert np.allclose(values[0, 1], embedded.grad[0], rtol=1e-3, atol=1e-4 * values[0].std())


@pytest.mark.parametrize("label", ["layer", "the quantized layer", None])
def test_a_value_that_is_not_finite_is_named(label: str | None, model: Model) -> None:
    layers = LayerwiseModel(model, model.config)
    walk = LayerWalk(layers, IDS, _cache(layers), label=label)

    def visit(layer: LayerPass) -> Iterator[Event]:
        next(iter(layer.weights.values()))[:] = float("nan")
        yield from layer.forward()

    walk.embed()
    if label is None:
        run_silently(walk.layer(0, visit))
        return
    with pytest.raises(SourceError, match=f"the output of {label} 0 .* not finite .window 0."):
        run_silently(walk.layer(0, visit))


def test_states_to_go_on_from_stay_until_the_next_layer_writes(tmp_path: Path) -> None:
    """What tells which file holds them is written after `commit`, and a kill may come between."""
    cache = HiddenStateCache((2, 3, 4), torch.float32, tmp_path)
    for index in range(2):
        cache.put(index, torch.full((1, 3, 4), float(index)))
    turn = cache.commit()
    for index in range(2):
        cache.put(index, torch.full((1, 3, 4), 8.0 + index))
    cache.commit()
    cache.close()
    earlier = HiddenStateCache((2, 3, 4), torch.float32, tmp_path, turn=turn)
    earlier.load()
    assert [float(earlier.get(index).mean()) for index in range(2)] == [0.0, 1.0]
    later = HiddenStateCache((2, 3, 4), torch.float32, tmp_path, turn=1 - turn)
    later.load()
    assert [float(later.get(index).mean()) for index in range(2)] == [8.0, 9.0]
