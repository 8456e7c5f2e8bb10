"""Statistics equal plain sums in double precision over inputs that transformers' hooks see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from support.calibrations import run

from quantcli.model import open_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from quantcli.statistics import collector  # noqa: E402

NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "c_attn": "attn_qkv", "attn.c_proj": "attn_output", "c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "qkv_proj": "attn_qkv", "gate_up_proj": "ffn_up",
}  # fmt: skip
EVERYTHING = ["abs_max", "mean_abs", "mean", "hessian", "min_max"]


def _tensor(name: str) -> str | None:
    if name == "lm_head":
        return "output.weight"
    parts = name.split(".")
    found = NAMES.get(".".join(parts[-2:])) or NAMES.get(parts[-1])
    layer = next((part for part in parts if part.isdigit()), None)
    return f"blk.{layer}.{found}.weight" if found else None


def _inputs(folder: Path, windows: NDArray[np.int32]) -> dict[str, NDArray[np.float64]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[str, list[Any]] = {}

    def watch(tensor: str) -> Callable[..., None]:
        return lambda _module, args: seen.setdefault(tensor, []).append(args[0].flatten(0, -2))

    for name, module in model.named_modules():
        tensor = _tensor(name)
        if tensor is not None:
            module.register_forward_pre_hook(watch(tensor))
    with torch.inference_mode():
        for window in windows:
            model(input_ids=torch.tensor([window.tolist()]))
    return {tensor: torch.cat(rows).double().numpy() for tensor, rows in seen.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen2"])
def test_statistics_are_plain_sums(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(name)
    run(folder, tmp_path / "m.gguf", collect=EVERYTHING)
    path = tmp_path / "m.stats.safetensors"
    found = load_file(path)
    shares = _shares(path)
    inputs = _inputs(folder, _windows(folder))
    named = {n.rpartition(".")[0] for n in found}
    # GPT-2's head is tied: its entry has the embedding's name.
    assert named - {"token_embd.weight"} == inputs.keys() - {"output.weight"} | (
        {"output.weight"} & named
    )
    for tensor, rows in inputs.items():
        stored = tensor if tensor in named else "token_embd.weight"
        assert found[f"{stored}.counts"].tolist() == [len(rows)]
        _close(found[f"{stored}.abs_max"][0], np.abs(rows).max(0))
        _close(found[f"{stored}.mean_abs"][0], np.abs(rows).mean(0))
        np.testing.assert_allclose(found[f"{stored}.mean"][0], rows.mean(0), atol=1e-5)
        _close(found[f"{stored}.min"][0], np.minimum(rows.min(0), 0))
        _close(found[f"{stored}.max"][0], np.maximum(rows.max(0), 0))
        _close(found[f"{shares[stored]}.hessian"][0], rows.T @ rows)


def test_a_hessian_is_stored_once_for_each_input(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    run(checkpoint("llama"), tmp_path / "m.gguf", collect=["hessian"])
    path = tmp_path / "m.stats.safetensors"
    stored = {n.removesuffix(".hessian") for n in load_file(path) if n.endswith(".hessian")}
    shares = _shares(path)
    assert set(shares.values()) == stored
    assert len(stored) == 2 * 4 + 1
    assert shares["blk.1.attn_k.weight"] == shares["blk.1.attn_v.weight"]
    assert shares["blk.0.ffn_up.weight"] == shares["blk.0.ffn_gate.weight"]
    assert shares["blk.0.ffn_down.weight"] == "blk.0.ffn_down.weight"


@pytest.mark.parametrize("waiting", [1 << 28, 1, 20000])
def test_every_expert_has_its_own(
    waiting: int, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "_WAITING", waiting)
    calibration = run(checkpoint("qwen3-moe"), tmp_path / "m.gguf", collect=["hessian"])
    found = load_file(tmp_path / "m.stats.safetensors")
    for tensor in ("blk.0.ffn_gate_exps.weight", "blk.1.ffn_down_exps.weight"):
        hessian = found[f"{tensor}.hessian"]
        squares = calibration.squares[tensor]
        assert hessian.shape == (*squares.shape, squares.shape[1])
        _close(np.diagonal(hessian, axis1=1, axis2=2), squares)
    counts = calibration.counts["blk.0.ffn_down_exps.weight"]
    assert len(set(counts.tolist())) > 1


def test_parts_of_latent_attention_see_what_llama_cpp_multiplies_them_with(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Keys' part, which comes first in each head, the query; values' part the latent vector."""
    folder, heads, nope, rope = checkpoint("deepseek-v3"), 4, 32, 16
    calibration = run(folder, tmp_path / "m.gguf", collect=EVERYTHING)
    path = tmp_path / "m.stats.safetensors"
    found, shares = load_file(path), _shares(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    queries: list[Any] = []
    latents: list[Any] = []
    attention = model.model.layers[1].self_attn
    attention.q_b_proj.register_forward_hook(lambda _m, _a, output: queries.append(output[0]))
    attention.kv_b_proj.register_forward_pre_hook(lambda _m, args: latents.append(args[0][0, 0]))
    with torch.inference_mode():
        for window in _windows(folder):
            model(input_ids=torch.tensor([window.tolist()]))
    keyed = torch.cat(queries).reshape(-1, heads, nope + rope)[:, :, :nope].double().numpy()
    latent = torch.cat(latents).double().numpy()
    squares = calibration.squares
    assert squares["blk.1.attn_v_b.weight"].shape == (heads, latent.shape[1])
    assert calibration.counts["blk.1.attn_v_b.weight"].tolist() == [len(latent)] * heads
    assert found["blk.1.attn_v_b.weight.hessian"].shape[0] == 1
    _close(found["blk.1.attn_v_b.weight.hessian"][0], latent.T @ latent)
    for head in range(heads):
        _close(squares["blk.1.attn_v_b.weight"][head], np.square(latent).sum(0))
        _close(squares["blk.1.attn_k_b.weight"][head], np.square(keyed[:, head]).sum(0))
        rows = keyed[:, head]
        _close(found["blk.1.attn_k_b.weight.hessian"][head], rows.T @ rows)
        _close(found["blk.1.attn_k_b.weight.abs_max"][head], np.abs(rows).max(0))
    assert shares["blk.1.attn_k_b.weight"] == "blk.1.attn_k_b.weight"


def test_columns_come_in_the_order_that_gguf_has(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Qwen3.5's delta nets, whose value heads llama.cpp has by turns, not in groups of a key's."""
    folder, keys, sharers, size = checkpoint("qwen35"), 2, 3, 16
    calibration = run(folder, tmp_path / "m.gguf", collect=EVERYTHING)
    path = tmp_path / "m.stats.safetensors"
    found, shares = load_file(path), _shares(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[str, list[Any]] = {"in_proj_z": [], "out_proj": []}
    for name, rows in seen.items():
        getattr(model.model.layers[2].linear_attn, name).register_forward_pre_hook(
            lambda _m, args, rows=rows: rows.append(args[0].flatten(0, -2))
        )
    with torch.inference_mode():
        for window in _windows(folder):
            model(input_ids=torch.tensor([window.tolist()]))
    normed, heads = (torch.cat(rows).double().numpy() for rows in seen.values())
    by_turns = heads.reshape(-1, keys, sharers, size).swapaxes(1, 2).reshape(len(heads), -1)
    _close(calibration.squares["blk.2.ssm_out.weight"][0], np.square(by_turns).sum(0))
    _close(found["blk.2.ssm_out.weight.hessian"][0], by_turns.T @ by_turns)
    home = {shares[f"blk.2.{name}.weight"] for name in ("attn_gate", "attn_qkv", "ssm_alpha")}
    assert len(home) == 1
    _close(found[f"{home.pop()}.hessian"][0], normed.T @ normed)
    with open_model(folder, vocabulary=False) as opened:
        matrices = {t.name for t in opened.tensors if len(t.shape) == 2 and "conv" not in t.name}
    assert calibration.squares.keys() == matrices - {"token_embd.weight"}


def test_an_unknown_statistic_is_refused() -> None:
    from quantcli.errors import UsageError
    from quantcli.statistics.input_statistics import check_needs

    with pytest.raises(UsageError, match="no statistic 'hesian'") as refused:
        check_needs(["hesian"])
    assert refused.value.hint == "did you mean hessian?"


@pytest.mark.parametrize("kind", ["weights", "embedding"])
def test_values_that_are_not_finite_are_refused_by_name(
    kind: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file as load
    from safetensors.torch import save_file

    from quantcli.errors import SourceError

    folder = tmp_path / "broken"
    shutil.copytree(checkpoint("llama"), folder)
    weights = load(folder / "model.safetensors")
    name = {
        "weights": "model.layers.1.self_attn.v_proj.weight",
        "embedding": "model.embed_tokens.weight",
    }[kind]
    weights[name][:, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=f"tensor {name}: the weight nan at row 0, column 3 "):
        run(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def _windows(folder: Path) -> NDArray[np.int32]:
    from support.calibrations import TEXT

    from quantcli.layerwise.texts import read_texts
    from quantcli.layerwise.windows import Tokenizer, make_windows
    from quantcli.model import open_model

    with open_model(folder) as model:
        return make_windows(Tokenizer(model), read_texts([str(TEXT)]), ctx=64, chunks=6).ids


def _shares(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        shares: dict[str, str] = json.loads(file.metadata()["hessian_of"])
    return shares


def _close(found: NDArray[Any], wanted: NDArray[Any]) -> None:
    """To float32's precision of the largest value: products of a window are float32."""
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 2e-6 * np.abs(wanted).max()
