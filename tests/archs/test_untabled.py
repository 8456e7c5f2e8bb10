"""Checkpoints without a table: layers told from names and shapes, in every model-folder layout."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from support.tiny.untabled import UNTABLED
from support.tiny_models import MODELS

import quantcli
from quantcli.archs.stored_names import is_linear, numbered_experts
from quantcli.archs.untabled import read_untabled
from quantcli.errors import (
    ArchitectureError,
    MismatchError,
    QuantcliError,
    UnknownArchitectureError,
)
from quantcli.types import TensorInfo

Checkpoint = Callable[..., Path]

LAYOUTS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"to": "compressed-tensors", "group_size": 16},
    "w8a8": {"to": "compressed-tensors", "activations": "int8"},
    "gptq": {"to": "gptq", "group_size": 32},
    "awq": {"to": "awq", "group_size": 32},
    "mlx": {"to": "mlx", "group_size": 32},
    "hf": {"to": "hf", "type": "Q4_K_M"},
}

APART = {
    "gemma4-moe": "its table knows that the family is published with experts in one tensor",
    "mistral4": "its table knows that the family is published with experts in one tensor",
    "granite-swa-moe": "its table knows that the family is published with experts in one tensor",
    "step35": "its table knows that stacks of experts have the names of matrices",
    "nemotron-h-moe": "its table knows that experts are those of an MLP, which is called a mixer",
    "nemotron-h-latent": "its table knows that experts are those of an MLP, called a mixer",
    "granite-moe-stacked": "its table knows that the family is published in other stacks",
    "mixtral-stacked": "its table knows the names under which Mixtral publishes experts",
}
"""Models whose folder without a table is another, and why."""

TYPES_APART = ("Falcon", "NemotronH", "GraniteMoe")
"""Classes whose decoded folders differ in the choice of types: Falcon's head takes eight bits,
Nemotron-H counts heads by layer, Granite's experts are two tensors of a GGUF."""

QUICK = {"gemma3-images", "gpt2", "llama", "lfm2", "qwen3-moe", "qwen3-moe-stacked"}


@pytest.fixture
def without_tables(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes the tables away when it is called."""

    def unknown(config: object) -> None:
        raise UnknownArchitectureError("architecture is not supported")

    return lambda: monkeypatch.setattr("quantcli.model.find_architecture", unknown)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in MODELS
        if name not in APART
    ],
)
def test_a_folder_without_a_table_is_that_with_one(
    name: str, checkpoint: Checkpoint, tmp_path: Path, without_tables: Callable[[], None]
) -> None:
    source = checkpoint(name)
    tiny = MODELS[name]
    # What GGUF holds transposed is rounded in blocks that a checkpoint does not have, and blocks
    # for multi-token prediction are kept without a table.
    apart = tiny.absorbed or tiny.beside or tiny.model.startswith(TYPES_APART)
    layouts = [each for each in LAYOUTS if each != "hf" or not apart]
    tabled = {each: _make(source, tmp_path / "tabled" / each, each) for each in layouts}
    assert any(isinstance(files, dict) for files in tabled.values())
    without_tables()
    for each, expected in tabled.items():
        found = _make(source, tmp_path / "free" / each, each)
        if isinstance(expected, dict) and isinstance(found, dict):
            differing = [f for f in expected | found if expected.get(f) != found.get(f)]
            assert differing == [], each
        elif isinstance(expected, QuantcliError):
            assert isinstance(found, QuantcliError)
            assert found.message == expected.message


def _make(source: Path, output: Path, layout: str) -> dict[str, bytes] | QuantcliError:
    """The folder's files, or why there is none."""
    output.parent.mkdir(exist_ok=True)
    try:
        quantcli.quantize(source, output, threads=1, **LAYOUTS[layout])
    except QuantcliError as refused:
        return refused
    return {path.name: path.read_bytes() for path in output.iterdir()}


LOADED = {
    "gptj": 12, "codegen": 8, "opt": 12, "xglm": 12, "helium": 14, "diffllama": 14,
    "minimax": 31, "jetmoe": 2,
}  # fmt: skip
"""How many matrices are quantized. transformers loads no packed Zamba2 or RecurrentGemma: its
tying of weights and its initialization look for weights that are packed."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOADED)
def test_transformers_loads_the_folder(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    done = quantcli.quantize(
        checkpoint(name), tmp_path / "w4", to="compressed-tensors", group_size=32
    )
    with safe_open(done.paths[0] / "model.safetensors", "numpy") as file:
        assert sum(name.endswith("weight_packed") for name in file.keys())  # noqa: SIM118 == LOADED[name]
    remark = f"there is no table for {UNTABLED[name].model}"
    assert sum(note.message.startswith(remark) for note in done.notes) == 1
    decoded = quantcli.quantize(done.paths[0], tmp_path / "f32", to="hf", type="F32").paths[0]
    expected = _logits(decoded)
    assert np.abs(_logits(done.paths[0]) - expected).max() < 1e-5 * expected.std()


def _logits(folder: Path) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(2, 4096, (1, 48), generator=torch.Generator().manual_seed(2))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(ids, use_cache=False).logits.numpy()


@pytest.mark.slow
def test_mlx_lm_loads_the_folder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    packed = quantcli.quantize(checkpoint("helium"), tmp_path / "mlx", to="mlx", group_size=32)
    decoded = quantcli.quantize(packed.paths[0], tmp_path / "f32", to="hf", type="F32").paths[0]
    torch = pytest.importorskip("torch")
    ids = torch.randint(2, 4096, (1, 48), generator=torch.Generator().manual_seed(2))
    model, _ = mlx_lm.load(str(packed.paths[0]))
    found = np.array(model(mx.array(ids.numpy())).astype(mx.float32))
    expected = _logits(decoded)
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.fixture
def own_class(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A Llama under a class name that nobody knows."""
    folder = tmp_path / "own"
    shutil.copytree(checkpoint("llama"), folder)
    _set(folder, architectures=["OurOwnForCausalLM"])
    return folder


def _set(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_class_that_nobody_knows_makes_folders_and_no_gguf(
    own_class: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    quantcli.quantize(own_class, tmp_path / "ours", to="gptq", group_size=32)
    quantcli.quantize(checkpoint("llama"), tmp_path / "llama", to="gptq", group_size=32)
    weights = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("ours", "llama")]
    assert weights[0] == weights[1]
    with pytest.raises(ArchitectureError) as refused:
        quantcli.quantize(own_class, tmp_path / "own.gguf")
    assert "OurOwnForCausalLM is not supported (convert it with llama.cpp's" in str(refused.value)
    assert "near" not in str(refused.value)


def test_what_only_llama_cpp_lacks_is_no_reason_against_a_folder(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "gelu"
    shutil.copytree(checkpoint("llama"), folder)
    _set(folder, hidden_act="gelu")
    with pytest.raises(ArchitectureError, match="hidden_act"):
        quantcli.quantize(folder, tmp_path / "m.gguf")
    done = quantcli.quantize(folder, tmp_path / "awq", to="awq", group_size=32)
    assert any("does not take this checkpoint (config.json sets hidden_act" in n.message
               for n in done.notes)  # fmt: skip


def test_a_damaged_checkpoint_is_refused_for_a_folder_too(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "deeper"
    shutil.copytree(checkpoint("llama"), folder)
    _set(folder, num_hidden_layers=3)
    with pytest.raises(MismatchError, match=r"tensor model\.layers\.2\.\S+ is missing"):
        quantcli.quantize(folder, tmp_path / "awq", to="awq", group_size=32)


def test_small_matrices_that_do_not_fit_are_kept_with_a_remark(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    done = quantcli.quantize(
        checkpoint("zamba2"), tmp_path / "w4", to="compressed-tensors", group_size=32
    )
    (remark,) = (note.message for note in done.notes if "do not fit" in note.message)
    assert re.match(
        r"2 of \d+ matrices, .* % of the linear weights, do not fit --to compressed", remark
    )


def test_what_is_kept_and_large_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    done = quantcli.quantize(checkpoint("jetmoe"), tmp_path / "w4", to="awq", group_size=32)
    (remark,) = (note.message for note in done.notes if "stacks of experts" in note.message)
    assert remark.startswith("8 stacks of experts are kept as they are")
    shapes = {"model.embed_tokens.weight": (64, 8), "model.layers.0.mlp.up.weight": (8, 8)}
    free = read_untabled({}, _stored(**shapes, **{"model.layers.0.memory": (64, 16)}))
    assert list(free.left) == ["model.layers.0.memory"]
    assert free.remark.endswith(
        "model.layers.0.memory, 64% of the weights, is none by name and kept"
    )


def _stored(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, shape, "BF16", 0, Path("m.safetensors"))
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), True),
        ("transformer.h.3.mlp.fc_in.weight", (32, 8), True),
        ("backbone.layers.0.mixer.in_proj.weight", (32, 8), True),
        ("model.layers.0.self_attn.q_proj.bias", (8,), False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), False),
        ("model.layers.0.mlp.gate.weight", (4, 8), False),
        ("model.layers.0.mlp.experts.0.up_proj.weight", (4, 8), True),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 8), False),
        ("model.layers.0.ffn.router.layer.weight", (4, 8), False),
        ("model.layers.0.conv.conv.weight", (8, 1, 4), False),
        ("model.layers.0.mamba.conv1d.weight", (8, 4), False),
        ("model.layers.0.per_layer_embedding.weight", (64, 8), False),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", (8, 8), False),
        ("visual.blocks.0.attn.qkv.weight", (24, 8), False),
        ("multi_modal_projector.linear_1.weight", (8, 8), False),
        ("lm_head.weight", (64, 8), False),
    ],
)
def test_linear_layers_are_told_by_name_and_shape(
    name: str, shape: tuple[int, ...], expected: bool
) -> None:
    (info,) = _stored(**{name: shape}).values()
    assert is_linear(name, info, {"model.layers.0.mlp."}) is expected


def test_experts_with_a_gap_are_not_stacked() -> None:
    whole = _stored(**{f"h.0.experts.{e}.w1.weight": (4, 8) for e in range(3)})
    gap = _stored(**{f"h.0.experts.{e}.w2.weight": (8, 4) for e in (0, 2)})
    found = numbered_experts([*whole, *gap], whole | gap)
    assert found == {"h.0.experts.{e}.w1.weight": list(whole)}


def test_stacked_experts_are_taken_apart_where_they_lie_by_rows() -> None:
    shapes = {"model.embed_tokens.weight": (64, 8)}
    block = "model.layers.0.mlp.experts"
    by_rows = {f"{block}.gate_up_proj": (3, 12, 8), f"{block}.down_proj": (3, 8, 6)}
    found = read_untabled({"vocab_size": 64}, _stored(**shapes, **by_rows))
    assert {t.name: (t.shape, t.pieces[1].start) for t in found.tensors[1:]} == {
        "blk.0.ffn_down_exps.weight": ((3, 8, 6), 8),
        "blk.0.ffn_gate_exps.weight": ((3, 6, 8), 12),
        "blk.0.ffn_up_exps.weight": ((3, 6, 8), 18),
    }
    assert found.sources["blk.0.ffn_up_exps.weight"] == f"{block}.{{e}}.up_proj.weight"
    assert found.apart == f"{block}.0.down_proj"
    turned = {f"{block}.gate_up_proj": (3, 8, 12), f"{block}.down_proj": (3, 6, 8)}
    found = read_untabled({"vocab_size": 64}, _stored(**shapes, **turned))
    assert {t.name: (t.shape, t.pieces[1].start) for t in found.tensors[1:]} == {
        "blk.0.ffn_down_exps.weight": ((3, 8, 6), 6),
        "blk.0.ffn_gate_up_exps.weight": ((3, 12, 8), 8),
    }
    stack = np.arange(3 * 6 * 8, dtype=np.float32).reshape(3, 6, 8)
    made = [piece.gather(stack) for piece in found.tensors[1].pieces]
    assert np.array_equal(np.stack(made), stack.transpose(0, 2, 1))
    assert (found.left, found.apart) == ({}, None)
    votes = {f"{block}.gate_up_proj": (3, 8, 8), f"{block}.down_proj": (3, 8, 8)}
    found = read_untabled({"vocab_size": 64}, _stored(**shapes, **votes))
    assert set(found.left) == set(votes)
