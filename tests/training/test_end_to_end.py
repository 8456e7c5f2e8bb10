"""Training end to end: predictions come closer, and what goes wrong changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support import ggml, tiny_models

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from support.llama_logits import llama_logits
from support.trained_runs import Run, train

from quantcli.formats import FORMATS, get_format, native
from quantcli.model import Model, open_model
from quantcli.rounding.block_scales import (
    count_factors,
    factor_gradients,
    read_factors,
    write_factors,
)
from quantcli.rounding.options import Outcome
from quantcli.rounding.trained import TrainingGain
from quantcli.training import end_to_end
from quantcli.training.layerwise_backprop import LayerwiseBackprop
from quantcli.types import Event, Progress

pytestmark = pytest.mark.slow

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"
KINDS = sorted(name for name in FORMATS if count_factors(get_format(name)))


@pytest.fixture(scope="module")
def mini() -> Iterator[Model]:
    with open_model(MINI) as model:
        yield model


@pytest.fixture(scope="module")
def trained(mini: Model, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(
        mini, tmp_path_factory.mktemp("trained") / "m.gguf", ctx=128, e2e_steps=16, e2e_codes=False
    )


@pytest.fixture(scope="module")
def plain(mini: Model, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(mini, tmp_path_factory.mktemp("plain") / "m.gguf", ctx=128, e2e=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with open_model(tiny_models.build("llama", tmp_path_factory.mktemp("small"))) as model:
        yield model


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_linear_in_the_factors(kind: str) -> None:
    """Doubling a factor adds its own part, as ggml decodes; which is what a gradient is."""
    fmt = get_format(kind)
    draws = np.random.default_rng(5)
    rows = draws.standard_normal((3, 2 * fmt.block)).astype(np.float32)
    weights = np.ones(rows.shape[1], np.float32) if fmt.needs_importance else None
    packed = native.encode(fmt, rows, weights)
    factors = read_factors(fmt, packed)
    assert np.array_equal(write_factors(fmt, packed, factors), packed)
    gradient = draws.standard_normal(rows.shape).astype(np.float32)
    found = factor_gradients(fmt, packed, gradient)
    before = ggml.dequantize(fmt.type_id, packed)
    for number in range(count_factors(fmt)):
        more = factors.copy()
        more[1, 1, number] *= 2
        change = ggml.dequantize(fmt.type_id, write_factors(fmt, packed, more)) - before
        assert not change[[0, 2]].any()
        assert not change[1, : fmt.block].any()
        expected = found[1, 1, number] * float(factors[1, 1, number])
        assert float((change * gradient).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_divergence_falls(trained: Run) -> None:
    assert trained.gain is not None
    assert trained.gain.after < 0.9 * trained.gain.before
    said = f"{trained.gain.before:.4g} -> {trained.gain.after:.4g} in 16 steps"
    assert any(said in note.message for note in trained.notes)


def test_only_factors_and_norms_are_moved(trained: Run, plain: Run) -> None:
    """Not a code and not a byte of the file's size."""
    moved = 0
    mine, other = trained.tensors, plain.tensors
    assert list(mine) == list(other)
    for name, tensor in mine.items():
        untrained = other[name]
        assert tensor.tensor_type == untrained.tensor_type
        moved += not np.array_equal(tensor.data, untrained.data)
        if tensor.tensor_type.name == "F32":
            assert np.abs(tensor.data / untrained.data - 1).max() < 0.1
            continue
        fmt = get_format(tensor.tensor_type.name)
        blocks = np.array([t.data.reshape(-1, fmt.nbytes) for t in (tensor, untrained)])
        for place in fmt.half_scales:
            blocks[:, :, place : place + 2] = 0
        assert np.array_equal(blocks[0], blocks[1]), name
    assert moved == len(mine) == 38


def _divergence(aim: Any, found: Any) -> float:
    """Mean KL divergence of logits (windows, tokens, vocabulary), in float64."""
    p, q = (torch.log_softmax(torch.as_tensor(x).double(), -1) for x in (aim, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_transformers_and_llama_cpp_find_the_divergence_that_was_told(
    trained: Run, plain: Run
) -> None:
    """With the file's weights as gguf decodes them; llama.cpp rounds activations besides."""
    model = transformers.AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32)
    ids = torch.from_numpy(trained.held_out)
    with torch.no_grad():
        aim = model(ids).logits
    assert trained.gain is not None
    for run, said in ((plain, trained.gain.before), (trained, trained.gain.after)):
        other = _with_weights(model, run)
        with torch.no_grad():
            found = other(ids).logits
        assert _divergence(aim, found) == pytest.approx(said, rel=1e-3)
        logits = np.stack([llama_logits(run.path, row.tolist()) for row in trained.held_out])
        assert _divergence(aim, logits) == pytest.approx(said, rel=0.05)
        assert np.abs(logits - found.numpy()).mean() < 0.05


def _with_weights(model: Any, run: Run) -> Any:
    other = transformers.AutoModelForCausalLM.from_config(model.config).float().eval()
    config, body = model.config, other.model
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in run.tensors.items():
        rows = gguf.dequantize(tensor.data, tensor.tensor_type)
        block, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in heads:
            # llama.cpp has a head's rotated pairs side by side.
            pairs = rows.reshape(heads[kind], -1, 2, rows.shape[1])
            rows = pairs.swapaxes(1, 2).reshape(rows.shape)
        if block:
            layer = body.layers[int(block.removeprefix("blk."))]
            place = {
                "attn_q": layer.self_attn.q_proj, "attn_k": layer.self_attn.k_proj,
                "attn_v": layer.self_attn.v_proj, "attn_output": layer.self_attn.o_proj,
                "ffn_gate": layer.mlp.gate_proj, "ffn_up": layer.mlp.up_proj,
                "ffn_down": layer.mlp.down_proj, "attn_norm": layer.input_layernorm,
                "ffn_norm": layer.post_attention_layernorm,
            }[kind]  # fmt: skip
        else:
            place = {"token_embd": body.embed_tokens, "output_norm": body.norm}[kind]
        with torch.no_grad():
            place.weight.copy_(torch.from_numpy(rows.copy()))
    return other


def test_the_file_records_it(trained: Run) -> None:
    fields = gguf.GGUFReader(trained.path).fields
    assert trained.gain is not None
    assert fields["quantcli.e2e.steps"].contents() == 16
    for key, value in (("before", trained.gain.before), ("after", trained.gain.after)):
        assert fields[f"quantcli.e2e.held_out_kld_{key}"].contents() == pytest.approx(value)


def test_harm_is_not_stored(small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "RATE", -0.5)
    monkeypatch.setattr(end_to_end, "CODE_RATE", -0.5)
    run = train(small, tmp_path / "m.gguf", file_type="Q4_0")
    other = train(small, tmp_path / "n.gguf", file_type="Q4_0", e2e=False)
    assert run.gain is not None
    assert run.gain.after == run.gain.before
    assert any("left as it was rounded" in note.message for note in run.notes)
    mine, plain = run.tensors, other.tensors
    assert all(np.array_equal(mine[name].data, plain[name].data) for name in plain)


def test_a_loss_that_is_not_finite_stops_it(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn, count = LayerwiseBackprop.learn, 0

    def broken(self: Any, numbers: Any) -> float:
        nonlocal count
        count += 1
        return float("nan") if count == 6 else learn(self, numbers)

    monkeypatch.setattr(LayerwiseBackprop, "learn", broken)
    run = train(small, tmp_path / "m.gguf", file_type="Q4_0", e2e_steps=12)
    assert count == 6
    warnings = [note.message for note in run.notes if note.level == "warning"]
    assert any("no longer finite at step 6 of 12" in text for text in warnings)
    assert run.gain is not None
    assert run.gain.after < run.gain.before
    for tensor in run.tensors.values():
        assert np.isfinite(gguf.dequantize(tensor.data, tensor.tensor_type)).all()


def test_an_interrupted_run_ends_in_the_same_bytes(small: Model, tmp_path: Path) -> None:
    whole = train(small, tmp_path / "whole.gguf", file_type="Q4_0")
    path = tmp_path / "m.gguf"
    train(small, path, file_type="Q4_0", stop=4)
    assert not path.exists()
    resumed = train(small, path, file_type="Q4_0", resume=True)
    assert not any(isinstance(event, Outcome) for event in resumed.events)
    assert path.read_bytes() == whole.path.read_bytes()
    assert sorted(tmp_path.iterdir()) == [path, whole.path]


def test_of_formats_without_factors_norms_are_moved_alone(mini: Model, tmp_path: Path) -> None:
    """NVFP4's scales are floats of eight bits, which belong to the codes, as do whole tensors'."""
    run = train(mini, tmp_path / "m.gguf", file_type="NVFP4", e2e_codes=False)
    other = train(mini, tmp_path / "n.gguf", file_type="NVFP4", e2e=False)
    assert run.gain is not None
    assert run.gain.after < run.gain.before
    for name, tensor in run.tensors.items():
        same = np.array_equal(tensor.data, other.tensors[name].data)
        coded = tensor.tensor_type.name == "NVFP4" or name.endswith(".scale")
        assert same == coded, name


@pytest.mark.parametrize(
    "name",
    ["llama", "llama-tied", "llama-biases", "mixtral-stacked", "phi3", "gpt2", "gemma2", "qwen3"],
)
def test_gradients_are_those_of_the_divergence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Central differences along the gradient, with every parameter found where it belongs."""
    shares = []

    def check(self: Any, steps: int) -> Iterator[Event]:
        scales, backprop, numbers = self._moved._scales, self._backprop, self._shares.fitted[:2]
        scales.forget()
        backprop.learn(numbers)
        planes = scales._planes
        gradient = planes[5].copy()
        assert all(gradient[span].any() for span in scales._spans.values())
        way = np.sign(gradient) * 0.01
        judged = []
        for sign in (1, -1):
            planes[2] = sign * way
            judged.append(backprop.judge(numbers))
        shares.append((judged[0] - judged[1]) / (2 * float((gradient * way).sum())))
        planes[2] = 0
        yield Progress(0, 1, "")
        end_to_end.save_trained(self._run.folder, None, TrainingGain(steps, 1.0, 1.0))

    monkeypatch.setattr(end_to_end._ModelTraining, "run", check)
    with open_model(tiny_models.build(name, tmp_path / "model")) as model:
        train(model, tmp_path / "m.gguf", file_type="Q4_0", e2e_codes=False)
    assert shares[0] == pytest.approx(1, abs=0.15)
