"""What tokens of experts count, against autograd on transformers' model and plain sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from quantcli.layerwise.hidden_states import HiddenStateCache
from quantcli.layerwise.input_hooks import MatmulInput, OutputGradient
from quantcli.layerwise.layerwise_model import LayerwiseModel
from quantcli.layerwise.walk import LayerPass, LayerWalk, run_silently
from quantcli.model import open_model
from quantcli.statistics import layer_gradients, router_flips
from quantcli.statistics.layer_gradients import (
    LayerGradients,
    measure_gradients,
    measure_output_fisher,
)
from quantcli.statistics.layer_hessians import FEW, HELD_OUT, HessianAccumulator
from quantcli.statistics.token_weights import TokenWeights
from quantcli.types import Event, OutputTensor

TOKENS = 24


def test_weights_are_squared_gradients_of_each_expert_s_products(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_flips, "SPREAD", 0.0)
    folder = checkpoint("qwen3-moe")
    ids = np.random.default_rng(0).integers(3, 200, (2, TOKENS)).astype(np.int32)
    found: dict[tuple[int, str, int], torch.Tensor] = {}
    with open_model(folder) as opened:
        layers = LayerwiseModel(opened, opened.config, dtype=torch.float32, device="cpu")
        gradients = LayerGradients(tmp_path, (0, 1))
        run_silently(measure_gradients(layers, ids, gradients))
        walk = LayerWalk(
            layers, ids, HiddenStateCache((2, TOKENS, layers.hidden_size), torch.float32)
        )

        def visit(layer: LayerPass) -> Iterator[Event]:
            back = enumerate(gradients.of(layer.index, layers))
            with measure_output_fisher(layer, back, opened.tensors, tmp_path) as fisher:
                weights = fisher.weights

                def observe(window: int) -> Callable[[MatmulInput], None]:
                    def keep(product: MatmulInput) -> None:
                        if "experts" in product.name:
                            own = weights.of(window, product)
                            assert own is not None
                            found[window, product.name, product.matrix] = own
                        else:
                            assert weights.of(window, product) is None

                    return keep

                yield from layer.forward(observe)

        walk.embed()
        for index in walk.layers:
            run_silently(walk.layer(index, visit))

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(layer_gradients._SEED)
    wanted: dict[tuple[int, str, int], torch.Tensor] = {}
    window = 0

    def watch(name: str, expert: int, output: torch.Tensor) -> None:
        def keep(gradient: torch.Tensor) -> None:
            wanted[window, name, expert] = gradient.square().sum(1)

        if len(output):
            output.register_hook(keep)

    for index, layer in enumerate(model.model.layers):

        def run(
            hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor,
            experts: torch.nn.Module = layer.mlp.experts, index: int = index,
        ) -> torch.Tensor:  # fmt: skip
            total = torch.zeros_like(hidden)
            for expert in range(len(experts.down_proj)):
                places, tokens = torch.where((chosen == expert).T)
                both = hidden[tokens] @ experts.gate_up_proj[expert].T
                watch(f"model.layers.{index}.mlp.experts.gate_up_proj", expert, both)
                gate, up = both.chunk(2, dim=1)
                output = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T
                watch(f"model.layers.{index}.mlp.experts.down_proj", expert, output)
                total = total.index_add(0, tokens, output * shares[tokens, places, None])
            return total

        layer.mlp.experts.forward = run
    for window in range(len(ids)):
        tokens = torch.from_numpy(ids[window : window + 1].astype(np.int64))
        scores = torch.log_softmax(model(tokens).logits, -1)[0]
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=draw)
        scores.gather(1, drawn).sum().backward()
    assert wanted.keys() == found.keys()
    for name in {name for _, name, _ in wanted}:
        everything = torch.cat([rows for key, rows in wanted.items() if key[1] == name])
        for key, squares in wanted.items():
            if key[1] == name:
                # Tokens of an expert by their places among the chosen, as transformers has them.
                assert torch.allclose(found[key], squares / everything.mean(), rtol=1e-3, atol=1e-5)


def test_weighed_hessians_are_weighed_means_drawn_to_the_layer_s(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    experts, columns, windows = 3, 8, HELD_OUT - 1
    stack = OutputTensor("blk.0.ffn_down_exps.weight", (experts, 4, columns), "F32")
    rows = {
        (window, expert): draw.standard_normal((20 + 90 * expert, columns)).astype(np.float32)
        for window in range(windows)
        for expert in range(experts)
    }
    squares = {key: draw.random(len(own)).astype(np.float32) for key, own in rows.items()}
    weights = TokenWeights()
    for (window, expert), own in squares.items():
        # A gradient of one number has its square.
        weights.add(window, OutputGradient("down", torch.from_numpy(own)[:, None].sqrt(), expert))
    with HessianAccumulator(
        lambda name, matrix: [(stack, matrix)], tmp_path, "a layer", 0.05, "natural"
    ) as sums:
        sums.weights = weights
        for window in range(windows):
            observe = sums.watch(window)
            for expert in range(experts):
                own = torch.from_numpy(rows[window, expert])
                observe(MatmulInput("down", expert, own, ("down", expert)))
        found = [sums.of(stack.name, expert) for expert in range(experts)]
        notes = sums.notes
    assert not notes
    mean = np.concatenate([*squares.values()]).mean()
    totals = []
    for expert in range(experts):
        x = np.concatenate([rows[w, expert] for w in range(windows)]).astype(np.float64)
        w = np.concatenate([squares[w, expert] for w in range(windows)]).astype(np.float64) / mean
        totals.append(((x * w[:, None]).T @ x, w.sum(), len(x)))
    whole = sum(t[0] for t in totals) / sum(t[1] for t in totals)
    for own, (product, total, count) in zip(found, totals, strict=True):
        assert count > FEW * columns
        wanted = (count * product / total + columns * whole) / (count + columns)
        assert own is not None
        assert np.abs(own.fit - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_few_tokens_of_experts_are_told_once_for_a_stack(tmp_path: Path) -> None:
    stack = OutputTensor("blk.0.ffn_down_exps.weight", (4, 4, 8), "F32")
    draw = np.random.default_rng(2)
    with HessianAccumulator(
        lambda name, matrix: [(stack, matrix)], tmp_path, "a layer", 0.05, "natural"
    ) as sums:
        observe = sums.watch(0)
        for expert, count in enumerate((0, 3, 5, 100)):
            if count:
                own = torch.from_numpy(draw.standard_normal((count, 8)).astype(np.float32))
                observe(MatmulInput("down", expert, own, ("down", expert)))
        assert all(sums.of(stack.name, expert) is not None for expert in range(4))
        (note,) = sums.notes
    assert "3 of 4 experts saw less than 32 inputs, 1 none and the others from 3 on" in str(note)
