"""Gradients by every output, layer by layer, against one backward pass of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from quantcli.layerwise.hidden_states import HiddenStateCache
from quantcli.layerwise.layerwise_model import LayerwiseModel
from quantcli.layerwise.walk import LayerPass, LayerWalk, run_silently
from quantcli.model import open_model
from quantcli.statistics import layer_gradients as sensitivity
from quantcli.statistics import router_flips
from quantcli.statistics.layer_gradients import (
    LayerGradients,
    choose_windows,
    measure_gradients,
    measure_output_fisher,
)
from quantcli.statistics.output_fisher import OutputFisher, StackShape, cut_strips
from quantcli.types import Event

Checkpoint = Callable[..., Path]
TOKENS = 24


def _ids(vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, vocabulary, (6, TOKENS)).astype(np.int32)


def _ours(folder: Path, work: Path) -> tuple[dict[str, OutputFisher], np.ndarray]:
    """Means by GGUF tensor or matrix of a stack, and the one at the embedding's output."""
    found: dict[str, OutputFisher] = {}
    with open_model(folder) as model:
        layers = LayerwiseModel(model, model.config, dtype=torch.float32, device="cpu")
        ids = _ids(int(model.config["vocab_size"]))
        gradients = LayerGradients(work, choose_windows(len(ids), 4))
        assert list(measure_gradients(layers, ids, gradients))
        # A second run takes the file.
        assert not list(measure_gradients(layers, ids, LayerGradients(work, gradients.numbers)))
        shapes = {t.name: StackShape.of(t) for t in model.tensors if len(t.shape) > 1}
        states = HiddenStateCache((4, TOKENS, layers.hidden_size), torch.float32)
        walk = LayerWalk(layers, ids[list(gradients.numbers)], states)

        def visit(layer: LayerPass) -> Iterator[Event]:
            back = enumerate(gradients.of(layer.index, layers))
            with measure_output_fisher(layer, back, model.tensors, work) as fisher:
                for name, shape in shapes.items():
                    for matrix in range(1 if shape.shared else shape.matrices):
                        own = fisher.of(name, matrix)
                        if own is not None:
                            found[name if shape.shared else f"{name}[{matrix}]"] = own
            assert not list(work.glob("fisher-*"))
            yield from layer.forward()

        walk.embed()
        for index in walk.layers:
            run_silently(walk.layer(index, visit))
        return found, gradients.embedding(1).fit


def _whole(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The same by module name, unshrunk, from transformers' own model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}
    ids = _ids(model.config.vocab_size)
    numbers = choose_windows(len(ids), 4)
    draw = torch.Generator().manual_seed(sensitivity._SEED)
    first = []

    def hook(name: str, output: torch.Tensor) -> None:
        output.register_hook(lambda g: sums.__setitem__(name, sums.get(name, 0) + g[0].T @ g[0]))

    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and "head" not in name:
            module.register_forward_hook(lambda m, i, o, name=name: hook(name, o))
    for number in numbers:
        tokens = torch.from_numpy(ids[number : number + 1].astype(np.int64))
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
        scores = torch.log_softmax(model(inputs_embeds=embedded).logits, -1)[0]
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=draw)
        scores.gather(1, drawn).sum().backward()
        first.append(embedded.grad[0])
    count = len(numbers) * TOKENS
    fitted = torch.cat(first[:3])
    return (
        {name: (part / count).numpy() for name, part in sums.items()},
        (fitted.T @ fitted / len(fitted)).numpy(),
    )


def _close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max())


def test_a_llama_s_gradients_are_autograd_s(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    ours, embedding = _ours(folder, tmp_path)
    whole, first = _whole(folder)
    assert _close(embedding, first)
    assert len(ours) == len(whole)
    heads = transformers.AutoConfig.from_pretrained(folder).num_attention_heads
    for gguf, module in (
        ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"),
        ("ffn_gate", "mlp.gate_proj"), ("ffn_down", "mlp.down_proj"),
        ("attn_q", "self_attn.q_proj"),
    ):  # fmt: skip
        for layer in range(2):
            wanted = whole[f"model.layers.{layer}.{module}"]
            if gguf == "attn_q":
                # llama.cpp has the halves of a head's rotary pairs side by side.
                size = len(wanted)
                order = np.arange(size).reshape(heads, 2, size // heads // 2).swapaxes(1, 2)
                wanted = wanted[np.ix_(order.reshape(-1), order.reshape(-1))]
            share = min(1.0, 4 * TOKENS / (4 * len(wanted)))
            shrunk = share * wanted + (1 - share) * np.diag(wanted.diagonal())
            assert _close(ours[f"blk.{layer}.{gguf}.weight"].means[0], shrunk), (gguf, layer)


def test_gpt2_s_fused_and_transposed_weights_get_theirs(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint("gpt2")
    ours, _ = _ours(folder, tmp_path)
    whole, _ = _whole(folder)
    wanted = whole["transformer.h.1.attn.c_attn"].diagonal()
    found = np.concatenate([mean.diagonal() for mean in ours["blk.1.attn_qkv.weight"].means])
    assert _close(found, wanted)
    assert _close(ours["blk.0.ffn_down.weight"].means[0].diagonal(),
                  whole["transformer.h.0.mlp.c_proj"].diagonal())  # fmt: skip


@pytest.fixture
def no_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the predictions alone; `test_router_flips` has the others."""
    monkeypatch.setattr(router_flips, "SPREAD", 0.0)


@pytest.mark.usefixtures("no_flips")
@pytest.mark.parametrize("name", ["mixtral", "mixtral-stacked", "qwen3-moe"])
def test_experts_share_the_mean_of_what_they_add_to_the_stream(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """An expert's output has its token's gradient, times the weight that the router gave it."""
    folder = checkpoint(name)
    ours, _ = _ours(folder, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = _ids(model.config.vocab_size)
    draw = torch.Generator().manual_seed(sensitivity._SEED)
    layers = model.model.layers
    weights: dict[int, torch.Tensor] = {}
    sums = [torch.zeros(())] * len(layers)
    counts = [0] * len(layers)

    def experts(index: int, given: tuple[torch.Tensor, ...], put: torch.Tensor) -> None:
        weights[index] = given[2].detach()

        def backwards(gradient: torch.Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1])
            share = weights[index].square().sum(-1, keepdim=True)
            sums[index] = sums[index] + (rows * share).T @ rows
            counts[index] += weights[index].numel()

        put.register_hook(backwards)

    for index, layer in enumerate(layers):
        layer.mlp.experts.register_forward_hook(
            lambda module, given, put, index=index: experts(index, given, put)
        )
    for number in choose_windows(len(ids), 4):
        tokens = torch.from_numpy(ids[number : number + 1].astype(np.int64))
        scores = torch.log_softmax(model(tokens).logits, -1)[0]
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=draw)
        scores.gather(1, drawn).sum().backward()
    for index in range(len(layers)):
        wanted = (sums[index] / counts[index]).numpy()
        share = min(1.0, counts[index] / (4 * len(wanted)))
        shrunk = share * wanted + (1 - share) * np.diag(wanted.diagonal())
        assert _close(ours[f"blk.{index}.ffn_down_exps.weight"].means[0], shrunk)


@pytest.mark.usefixtures("no_flips")
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_every_expert_has_its_own_mean_inside(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Gradients by gate's and up's outputs, from an experts' forward pass written out here."""
    folder = checkpoint(name)
    ours, _ = _ours(folder, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = _ids(model.config.vocab_size)
    draw = torch.Generator().manual_seed(sensitivity._SEED)
    seen: dict[str, list[torch.Tensor]] = {}
    for index, layer in enumerate(model.model.layers):

        def run(
            hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor,
            experts: torch.nn.Module = layer.mlp.experts, index: int = index,
        ) -> torch.Tensor:  # fmt: skip
            total = torch.zeros_like(hidden)
            for expert in range(len(experts.down_proj)):
                tokens, places = torch.where(chosen == expert)
                gate_weight, up_weight = experts.gate_up_proj[expert].chunk(2)
                gate, up = hidden[tokens] @ gate_weight.T, hidden[tokens] @ up_weight.T
                for kind, output in (("gate", gate), ("up", up)):
                    key = f"blk.{index}.ffn_{kind}_exps.weight[{expert}]"
                    output.register_hook(seen.setdefault(key, []).append)
                inside = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T
                total = total.index_add(0, tokens, inside * shares[tokens, places, None])
            return total

        layer.mlp.experts.forward = run
    for number in choose_windows(len(ids), 4):
        tokens = torch.from_numpy(ids[number : number + 1].astype(np.int64))
        scores = torch.log_softmax(model(tokens).logits, -1)[0]
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=draw)
        scores.gather(1, drawn).sum().backward()
    assert seen
    for key, gradients in seen.items():
        rows = torch.cat(gradients)
        if not len(rows):
            assert key not in ours
            continue
        mean = (rows.T @ rows / len(rows)).numpy()
        share = min(1.0, len(rows) / (4 * len(mean)))
        shrunk = share * mean + (1 - share) * np.diag(mean.diagonal())
        assert _close(ours[key].means[0], shrunk), key


@pytest.mark.usefixtures("no_flips")
def test_gate_and_up_that_are_columns_by_turns_have_theirs(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """gpt-oss stores both in one turned tensor, a column of gate before each of up."""
    folder = checkpoint("gpt-oss")
    ours, _ = _ours(folder, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    draw = torch.Generator().manual_seed(sensitivity._SEED)
    ids = _ids(model.config.vocab_size)
    seen: dict[str, list[torch.Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        turns: list[int] = []

        def start(module, given, named, turns=turns) -> None:
            chosen = named["router_indices"] if "router_indices" in named else given[1]
            turns[:] = sorted(set(chosen.flatten().tolist()), reverse=True)

        def gate(both, turns=turns, index=index, own=experts._apply_gate) -> torch.Tensor:
            expert = turns.pop()
            for kind, first in (("gate", 0), ("up", 1)):
                key = f"blk.{index}.ffn_{kind}_exps.weight[{expert}]"
                both.register_hook(
                    lambda g, k=key, f=first: seen.setdefault(k, []).append(g[:, f::2])
                )
            return own(both)

        experts.register_forward_pre_hook(start, with_kwargs=True)
        experts._apply_gate = gate
    for number in choose_windows(len(ids), 4):
        tokens = torch.from_numpy(ids[number : number + 1].astype(np.int64))
        scores = torch.log_softmax(model(tokens).logits, -1)[0]
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=draw)
        scores.gather(1, drawn).sum().backward()
    assert seen
    for key, gradients in seen.items():
        rows = torch.cat(gradients)
        mean = (rows.T @ rows / len(rows)).numpy()
        share = min(1.0, len(rows) / (4 * len(mean)))
        shrunk = share * mean + (1 - share) * np.diag(mean.diagonal())
        assert _close(ours[key].means[0], shrunk), key


def test_strips_cover_all_rows() -> None:
    for rows in (1, 4096, 4097, 11008, 50000):
        strips = cut_strips(rows)
        assert strips[0].start == 0
        assert strips[-1].stop == rows
        assert all(a.stop == b.start for a, b in pairwise(strips))
        assert max(s.stop - s.start for s in strips) <= 4096


def test_a_damaged_or_unfinished_file_is_not_taken(tmp_path: Path) -> None:
    made = LayerGradients(tmp_path, (0, 2))
    made.create((3, 2, 4, 8))[()] = np.float32(1)
    assert not LayerGradients(tmp_path, (0, 2)).open((3, 2, 4, 8))
    made.finish(np.zeros(5))
    assert LayerGradients(tmp_path, (0, 2)).open((3, 2, 4, 8))
    assert not LayerGradients(tmp_path, (0, 1)).open((3, 2, 4, 8))
    assert not LayerGradients(tmp_path, (0, 2)).open((3, 2, 4, 16))
    (tmp_path / "gradients.json").write_text("[0, ")
    assert not LayerGradients(tmp_path, (0, 2)).open((3, 2, 4, 8))
