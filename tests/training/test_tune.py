"""Tuning: every state is on the grid, a layer's error falls, and what goes wrong stops it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support import tiny_models

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from quantcli.artifacts.gguf_file import prepare_gguf, take_encoded
from quantcli.artifacts.write import write_artifact
from quantcli.errors import UsageError
from quantcli.formats import get_format, native
from quantcli.formats.lattice import LATTICES
from quantcli.layerwise.texts import Text
from quantcli.model import Model, open_model
from quantcli.plan.recipe import Recipe
from quantcli.rounding.options import Options
from quantcli.run.calibrated_run import begin_rounding, prepare_run, round_tensors
from quantcli.run.methods import Chain, parse_methods
from quantcli.run.recipe_options import check_methods, read_options
from quantcli.statistics.layer_hessians import HELD_OUT
from quantcli.training import tune
from quantcli.training.trainable_codes import Trainable, is_trainable
from quantcli.types import Event, Note

pytestmark = pytest.mark.slow

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"
TEXT = (Path(__file__).parents[1] / "data" / "pride-and-prejudice.txt").read_text()
TUNED = re.compile(r"layer (\d+): tuned, held-out error of its output (\S+) -> (\S+)")
KINDS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
         "IQ4_NL", "IQ4_XS", "TQ2_0"]  # fmt: skip


@dataclass
class Run:
    """One run's output, its events, and the windows that it saw."""

    path: Path
    events: list[Event]
    ids: Any

    @property
    def notes(self) -> list[Note]:
        return [event for event in self.events if isinstance(event, Note)]

    @property
    def tuned(self) -> dict[int, tuple[float, float]]:
        found = [TUNED.match(note.message) for note in self.notes]
        return {int(m[1]): (float(m[2]), float(m[3])) for m in found if m}


def _run(
    model: Model, path: Path, *, file_type: str = "Q2_K", resume: bool = False,
    stop: str = "", ctx: int = 64, **options: Any,
) -> Run:  # fmt: skip
    """Quantize; the run ends after a note that starts with ``stop``, as by an interrupt."""
    planned = prepare_run(model, [Text("a text", TEXT)], ctx=ctx, chunks=24)
    job = prepare_gguf(model, Recipe(type=file_type), path, importance=planned.importance)
    told = Options(**{"trainer": "tune", "tune_steps": 24, **options})
    encoding = begin_rounding(planned, job.plan, path, told, dtype="float32", resume=resume)
    events = round_tensors(encoding)
    seen = []
    for event in events:
        seen.append(event)
        if stop and isinstance(event, Note) and event.message.startswith(stop):
            break
    else:
        for _ in write_artifact(take_encoded(job, encoding.store)):
            pass
        encoding.checkpoint.remove()
    assert isinstance(events, Iterator)
    del events
    encoding.store.close()
    return Run(path, seen, planned.windows.ids)


@pytest.fixture(scope="module")
def mini() -> Iterator[Model]:
    with open_model(MINI) as model:
        yield model


@pytest.fixture(scope="module")
def whole(mini: Model, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run(mini, tmp_path_factory.mktemp("whole") / "m.gguf", ctx=160)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with open_model(tiny_models.build("llama", tmp_path_factory.mktemp("small"))) as model:
        yield model


def _trainable(kind: str) -> tuple[Trainable, Any, Any]:
    rows = np.random.default_rng(7).standard_normal((6, 512)).astype(np.float32)
    rows[2, :256] = 0
    packed = native.encode(get_format(kind), rows)
    return Trainable(kind, packed, rows), packed, rows


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_is_what_gguf_decodes(kind: str) -> None:
    tensor, packed, rows = _trainable(kind)
    decoder = gguf.GGMLQuantizationType[kind]
    assert np.array_equal(gguf.dequantize(packed, decoder), tensor.values().numpy())
    draw = torch.Generator().manual_seed(1)
    for _ in range(12):
        tensor.descend(torch.randn(rows.shape, generator=draw), 0.2)
    moved = tensor.pack()
    assert (moved != packed).mean() > 0.1
    values = tensor.values().numpy()
    assert np.isfinite(values).all()
    assert np.array_equal(gguf.dequantize(moved, decoder), values)


@pytest.mark.parametrize("kind", KINDS)
def test_descent_lowers_a_quadratic_loss(kind: str) -> None:
    """Errors under a correlated Hessian, which the encoder alone knows nothing of."""
    tensor, _, rows = _trainable(kind)
    mix = np.random.default_rng(8).standard_normal((512, 64)).astype(np.float32)
    hessian = torch.from_numpy(mix @ mix.T / 64 + 0.05 * np.eye(512, dtype=np.float32))
    aim = torch.from_numpy(rows)

    def loss() -> float:
        errors = tensor.values() - aim
        return float((errors @ hessian * errors).sum())

    before = loss()
    for step in range(60):
        tensor.descend((tensor.values() - aim) @ hessian, (1 - step / 60) / 30)
    assert loss() < 0.8 * before


def test_what_can_be_trained() -> None:
    assert all(is_trainable(kind) for kind in KINDS)
    others = {"MXFP4", "NVFP4", "IQ2_XS", "F16"}
    assert not any(is_trainable(kind) for kind in others)
    assert others & set(LATTICES) == {"MXFP4", "NVFP4"}


def test_layers_of_a_two_bit_model_improve(whole: Run) -> None:
    """One of the four may already be as good as training makes it."""
    assert len(whole.tuned) >= 3
    assert all(after < 0.98 * before for before, after in whole.tuned.values())


def test_transformers_finds_the_same_held_out_error(
    whole: Run, mini: Model, tmp_path: Path
) -> None:
    """Layer 0 of transformers' own model with the file's weights, as gguf decodes them."""
    plain = _run(mini, tmp_path / "m.gguf", ctx=160, trainer=None)
    model = transformers.AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32)
    ids = torch.from_numpy(whole.ids[HELD_OUT - 1 :: HELD_OUT].astype(np.int64))
    aim = _layer_output(model, ids)
    for path, said in ((plain.path, whole.tuned[0][0]), (whole.path, whole.tuned[0][1])):
        _fill_first_layer(model, path)
        errors = (_layer_output(model, ids) - aim).square().sum(-1) / aim.square().sum(-1)
        assert float(errors.mean()) == pytest.approx(said, rel=2e-3)


def _layer_output(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[1]


def _fill_first_layer(model: Any, path: Path) -> None:
    layer, config = model.model.layers[0], model.config
    modules = {
        "attn_q": layer.self_attn.q_proj, "attn_k": layer.self_attn.k_proj,
        "attn_v": layer.self_attn.v_proj, "attn_output": layer.self_attn.o_proj,
        "ffn_gate": layer.mlp.gate_proj, "ffn_up": layer.mlp.up_proj,
        "ffn_down": layer.mlp.down_proj,
    }  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in gguf.GGUFReader(path).tensors:
        block, _, name = tensor.name.removesuffix(".weight").rpartition(".")
        if block != "blk.0" or name not in modules:
            continue
        rows = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name in heads:
            # llama.cpp has a head's rotated pairs side by side.
            pairs = rows.reshape(heads[name], -1, 2, rows.shape[1])
            rows = pairs.swapaxes(1, 2).reshape(rows.shape)
        modules[name].weight.data = torch.from_numpy(rows.copy())


def test_an_interrupted_run_ends_in_the_same_bytes(small: Model, tmp_path: Path) -> None:
    whole = _run(small, tmp_path / "whole.gguf", file_type="Q4_0", rounder="nearest")
    path = tmp_path / "m.gguf"
    _run(small, path, file_type="Q4_0", rounder="nearest", stop="layer 1: ")
    assert not path.exists()
    resumed = _run(small, path, file_type="Q4_0", rounder="nearest", resume=True)
    assert sorted(whole.tuned) == [0, 1]
    assert 0 not in resumed.tuned
    assert path.read_bytes() == whole.path.read_bytes()


def test_a_loss_that_is_not_finite_stops_the_layer(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = tune._LayerTraining._loss
    count = 0

    def broken(self: Any, number: int) -> Any:
        nonlocal count
        count += torch.is_grad_enabled()
        return loss(self, number) * (float("nan") if count > 4 * tune.BATCH else 1)

    monkeypatch.setattr(tune._LayerTraining, "_loss", broken)
    monkeypatch.setattr(tune, "MARGIN", 0.0)
    run = _run(small, tmp_path / "m.gguf", file_type="Q4_0")
    warnings = [note.message for note in run.notes if note.level == "warning"]
    stopped = [text for text in warnings if "no longer finite" in text]
    assert "layer 0: the loss was no longer finite at step 5 of 24" in stopped[0]
    assert all(after <= before for before, after in run.tuned.values())
    for tensor in gguf.GGUFReader(run.path).tensors:
        assert np.isfinite(gguf.dequantize(tensor.data, tensor.tensor_type)).all()


def test_a_layer_that_does_not_clearly_improve_keeps_its_bytes(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "MARGIN", 0.9)
    run = _run(small, tmp_path / "tuned.gguf", file_type="Q4_0", tune_steps=2)
    plain = _run(small, tmp_path / "plain.gguf", file_type="Q4_0", trainer=None)
    assert not run.tuned
    assert sum("left as it is" in note.message for note in run.notes) == 2
    mine, other = (gguf.GGUFReader(r.path).tensors for r in (run, plain))
    for tensor, untuned in zip(mine, other, strict=True):
        assert np.array_equal(tensor.data, untuned.data), tensor.name


@pytest.mark.parametrize("name", ["mixtral", "phi3", "gpt2", "gemma2"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """Experts in a stack, fused and transposed parameters; rounded by the encoder alone."""
    with open_model(tiny_models.build(name, tmp_path / "model")) as model:
        run = _run(model, tmp_path / "m.gguf", file_type="Q4_0", rounder="nearest")
    assert run.tuned
    for before, after in run.tuned.values():
        # Experts that are chosen otherwise cost the most.
        assert after < 0.98 * before < 0.2
    assert not any("gptq" in note.message for note in run.notes)


def test_it_fits_to_the_quantized_prefix(small: Model, tmp_path: Path) -> None:
    run = _run(small, tmp_path / "m.gguf", file_type="Q4_0", rounder="nearest", propagate=True)
    other = _run(small, tmp_path / "n.gguf", file_type="Q4_0", rounder="nearest")
    # The later layer is given more error, and makes some of it good.
    assert run.tuned[1][0] > 1.1 * other.tuned[1][0]
    assert run.tuned[1][1] < run.tuned[1][0]


def test_its_place_among_the_methods() -> None:
    assert parse_methods("gptq,tune") == Chain((), "gptq", "tune")
    assert parse_methods("awq,tune") == Chain(("awq",), None, "tune")
    assert parse_methods("tune").rounds
    assert not parse_methods("awq").rounds
    for text, hint in (("tune,gptq", "gptq,tune"), ("tune,awq,gptq", "awq,gptq,tune")):
        with pytest.raises(UsageError, match="after tune, which trains") as caught:
            parse_methods(text)
        assert caught.value.hint == f"--method {hint}"
    told = read_options(Recipe(type="Q2_K", method="gptq,tune", tune_steps=7))
    assert (told.rounder, told.trainer, told.tune_steps) == ("gptq", "tune", 7)
    with pytest.raises(UsageError, match="belongs to the method tune"):
        check_methods(Recipe(type="Q2_K", method="gptq", tune_steps=7))
    with pytest.raises(UsageError, match="--damping belongs to the method gptq") as caught:
        check_methods(Recipe(type="Q2_K", method="awq,tune", damping=0.1))
    assert caught.value.hint == "--method awq,gptq,tune"
    check_methods(Recipe(type="Q2_K", method="tune", propagate=True))
    with pytest.raises(UsageError, match="two methods of which each rounds"):
        parse_methods("gptq,nearest")
    with pytest.raises(UsageError, match="--tune-steps 0 is out of range"):
        check_methods(Recipe(type="Q2_K", method="tune", tune_steps=0))
