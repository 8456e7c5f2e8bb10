"""Gradients of changed choices of experts, against transformers' whole model and the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from quantcli.layerwise.layerwise_model import LayerwiseModel
from quantcli.model import open_model
from quantcli.statistics import layer_gradients, router_flips
from quantcli.statistics.layer_gradients import LayerGradients, measure_gradients
from quantcli.statistics.router_flips import SPREAD, flip_gradients

TOKENS = 48


def _whole(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Gradients by the embedding (windows, tokens, size), changed choices among them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    for layer in model.model.layers:
        logits: list[torch.Tensor] = []
        costs: list[torch.Tensor] = []

        def add(
            gradient: torch.Tensor, logits=logits, costs=costs, top=model.config
        ) -> torch.Tensor:
            values, order = logits[-1].detach().sort(dim=-1, descending=True)
            last = top.num_experts_per_tok - 1
            gap = values[:, last] - values[:, last + 1]
            spread = SPREAD * float(gap.median())
            near = (gap / spread) * (-((gap / spread) ** 2) / 2).exp()
            cost = float((near * costs[-1]).sum() / near.sum())
            weight = cost * near / math.sqrt(2 * math.pi) / (2 * spread**2)
            draw = torch.Generator().manual_seed(router_flips._SEED)
            signed = (2 * weight).sqrt() * (torch.randint(0, 2, gap.shape, generator=draw) * 2 - 1)
            rows = torch.arange(len(gap))
            found = gradient.clone()
            found[rows, order[:, last]] += signed
            found[rows, order[:, last + 1]] -= signed
            return found

        def routed(module, given, put, logits=logits, add=add) -> None:
            logits.append(put[0])
            put[0].register_hook(add)

        def weighed(module, given, logits=logits, costs=costs) -> None:
            _, index, weights = given
            place = logits[-1].detach().gather(1, index).argmin(dim=1)
            rows = torch.arange(len(place))
            weights.register_hook(
                lambda g: costs.append((g * weights.detach())[rows, place].square())
            )

        layer.mlp.gate.register_forward_hook(routed)
        layer.mlp.experts.register_forward_pre_hook(weighed)
    draw = torch.Generator().manual_seed(layer_gradients._SEED)
    found = []
    for window in torch.from_numpy(ids.astype(np.int64)):
        embedded = model.get_input_embeddings()(window[None]).detach().requires_grad_(True)
        scores = torch.log_softmax(model(inputs_embeds=embedded).logits, -1)[0]
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=draw)
        scores.gather(1, drawn).sum().backward()
        found.append(embedded.grad[0].numpy())
    return np.stack(found)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_changed_choices_go_back_through_the_model(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(name)
    with open_model(folder) as model:
        layers = LayerwiseModel(model, model.config, dtype=torch.float32, device="cpu")
        ids = np.random.default_rng(0).integers(3, layers.vocabulary, (2, TOKENS)).astype(np.int32)

        def measure(work: Path) -> np.ndarray:
            work.mkdir()
            gradients = LayerGradients(work, (0, 1))
            list(measure_gradients(layers, ids, gradients))
            return np.concatenate([g.numpy() for g in gradients.of(-1, layers)])

        found = measure(tmp_path / "with")
        monkeypatch.setattr(router_flips, "SPREAD", 0.0)
        without = measure(tmp_path / "without")
    wanted = _whole(folder, ids)
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()
    assert np.abs(found - without).max() > 1e-2 * np.abs(wanted).max()


def test_the_weight_is_the_derivative_of_the_expected_cost() -> None:
    """By the variance of the gaps' errors, of the cost times the chance of another order."""
    gap = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cost = 0.3
    spread = SPREAD * float(gap.median())

    def expected(variance: float) -> float:
        chances = 0.5 * torch.erfc(gap / math.sqrt(2 * variance))
        return float(cost * chances.sum())

    step = 1e-4 * spread**2
    slope = (expected(spread**2 + step) - expected(spread**2 - step)) / (2 * step)
    found = flip_gradients(gap, torch.full_like(gap, cost))
    assert found is not None
    assert float(found.square().sum() / 2) == pytest.approx(slope, rel=1e-3)
    assert 0.4 < float((found > 0).double().mean()) < 0.6


def test_another_order_than_the_logits_is_left_alone() -> None:
    gap = torch.tensor([0.5, -0.1, 0.4])
    assert flip_gradients(gap, torch.ones(3)) is None
    assert flip_gradients(torch.zeros(3), torch.ones(3)) is None
