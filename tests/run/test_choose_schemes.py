"""Schemes of a folder's modules chosen by cost: what is stored, what readers make of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

pytest.importorskip("torch")
pytest.importorskip("transformers")

import quantcli
from quantcli.errors import PlanError, UsageError
from quantcli.types import Event, Progress

TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@pytest.fixture(scope="module")
def matrix(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matrix") / "m.gguf"
    quantcli.calibrate(mini, TEXT, output=path, chunks=4)
    return path


@pytest.fixture(autouse=True)
def few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two random windows in place of forty show as well what becomes of a choice."""
    monkeypatch.setattr("quantcli.run.choose_by_importance.WINDOWS", 2)


def _settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found["quantization_config"]


def _bits(folder: Path) -> dict[str, int]:
    """Bits by module, from compressed-tensors' groups."""
    groups = _settings(folder)["config_groups"].values()
    return {module: g["weights"]["num_bits"] for g in groups for module in g["targets"]}


def _stored_bytes(folder: Path) -> int:
    """Bytes of all tensors, from the headers of the files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        size = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + size])
        header.pop("__metadata__")
        total += sum(stop - start for start, stop in (e["data_offsets"] for e in header.values()))
    return total


def _floats(folder: Path) -> dict[str, Any]:
    return {
        name: value.float().numpy()
        for file in folder.glob("*.safetensors")
        for name, value in load_torch(file).items()
    }


def _weights(mini: Path) -> int:
    return sum(values.size for values in _floats(mini).values())


def test_a_folder_has_one_scheme_for_what_is_run_as_one(
    mini: Path, matrix: Path, tmp_path: Path
) -> None:
    plain, chosen = tmp_path / "plain", tmp_path / "chosen"
    options = {"to": "compressed-tensors", "imatrix": matrix}
    quantcli.quantize(mini, plain, **options)
    made = quantcli.quantize(mini, chosen, allocate=True, **options)
    assert any("schemes chosen for 16 groups of modules" in note.message for note in made.notes)
    assert _stored_bytes(chosen) <= _stored_bytes(plain)
    found = _bits(chosen)
    kept = set(_settings(chosen)["ignore"])
    assert len(set(found.values())) > 1
    for layer in range(4):
        for part, block in zip(FUSED, ("self_attn", "mlp"), strict=True):
            names = [f"model.layers.{layer}.{block}.{leaf}" for leaf in part]
            assert len({found.get(name) for name in names}) == 1
            assert all((name in kept) != (name in found) for name in names)


def test_transformers_computes_what_was_meant(mini: Path, matrix: Path, tmp_path: Path) -> None:
    """Of mixed schemes, kept modules too: the logits of the decoded weights."""
    pytest.importorskip("compressed_tensors")
    import torch
    import transformers

    folder, decoded = tmp_path / "chosen", tmp_path / "decoded"
    quantcli.quantize(
        mini, folder, to="compressed-tensors", imatrix=matrix, target_bpw=9.5,
        allocate_from="W3A16,W4A16_G64,W8A16,NVFP4A16,MXFP8A16,keep",
    )  # fmt: skip
    kinds = {g["format"] for g in _settings(folder)["config_groups"].values()}
    assert len(kinds) > 1
    assert _settings(folder)["format"] == "mixed-precision"
    quantcli.quantize(folder, decoded, to="hf", type="BF16")
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, 4000, (1, 64)))
    found = []
    for path in (folder, decoded):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        with torch.no_grad():
            found.append(model(ids).logits[0].float())
    assert float((found[0] - found[1]).norm()) < 0.01 * float(found[1].norm())


@pytest.mark.parametrize("bits", [6.6, 7.5])
def test_bits_for_each_weight_are_those_of_all_stored_tensors(
    bits: float, mini: Path, matrix: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    made = quantcli.quantize(mini, folder, to="compressed-tensors", imatrix=matrix, target_bpw=bits)
    found = 8 * _stored_bytes(folder) / _weights(mini)
    assert bits - 0.1 < found <= bits
    assert made.bits_per_weight == pytest.approx(found)


def test_a_size_is_that_of_the_whole_folder(mini: Path, matrix: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    quantcli.quantize(mini, folder, to="compressed-tensors", imatrix=matrix, target_size="3.9M")
    assert 3_860_000 < sum(file.stat().st_size for file in folder.iterdir()) <= 3_900_000


@pytest.mark.parametrize("to", ["gptq", "gptq-v2"])
def test_gptqs_settings_give_each_module_its_bits(
    to: str, mini: Path, matrix: Path, tmp_path: Path
) -> None:
    """The words of every module are as many as the first pattern that fits it says; a pattern fits
    the one module that vLLM makes of several just as it fits these."""
    folder = tmp_path / "out"
    quantcli.quantize(
        mini, folder, to=to, imatrix=matrix, target_bpw=7.1, allocate_from="W3A16,W4A16,W8A16"
    )
    settings = _settings(folder)
    stored = load_file(folder / "model.safetensors")

    def find(module: str) -> dict[str, Any] | None:
        for pattern, own in settings.get("dynamic", {}).items():
            if re.match(pattern[2:], module):
                return None if pattern.startswith("-:") else {**settings, **own}
        return settings

    seen = set()
    weights = _floats(mini)
    for name, values in weights.items():
        if not name.endswith("_proj.weight"):
            continue
        module = name.removesuffix(".weight")
        own = find(module)
        assert (own is not None) == (f"{module}.qweight" in stored)
        if own is None:
            continue
        rows, columns = values.shape
        seen.add(own["bits"])
        assert stored[f"{module}.qweight"].shape == (columns * own["bits"] // 32, rows)
        assert stored[f"{module}.scales"].shape == (columns // own["group_size"], rows)
    assert len(seen) > 1
    for layer in range(4):
        for parts, block, one in zip(
            FUSED, ("self_attn", "mlp"), ("qkv_proj", "gate_up_proj"), strict=True
        ):
            whole = find(f"model.layers.{layer}.{block}.{one}")
            apart = find(f"model.layers.{layer}.{block}.{parts[0]}")
            assert whole is None or apart is None or whole["bits"] == apart["bits"]


def test_mlx_runs_modules_of_several_widths(mini: Path, matrix: Path, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    folder = tmp_path / "out"
    quantcli.quantize(mini, folder, to="mlx", imatrix=matrix, target_bpw=4.4)
    assert 8 * _stored_bytes(folder) <= 4.4 * _weights(mini)
    model, _ = mlx_lm.load(str(folder))
    widths = set()
    weights = _floats(mini)
    for name, module in model.named_modules():
        if hasattr(module, "scales"):
            widths.add(module.bits)
            parts = (module.scales.astype(mx.float32), module.biases.astype(mx.float32))
            values = np.array(mx.dequantize(module.weight, *parts, module.group_size, module.bits))
            missed = np.linalg.norm(values - weights[f"{name}.weight"])
            assert missed < 0.3 * np.linalg.norm(weights[f"{name}.weight"]), name
    assert len(widths) > 1


def test_the_experts_of_a_layer_have_one_scheme(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, folder = checkpoint("qwen3-moe", "bfloat16"), tmp_path / "out"
    quantcli.quantize(
        source, folder, to="compressed-tensors", group_size=32, allocate=True, method="nearest",
        calibrate=TEXT, chunks=2, allocate_from="W3A16_G32,W4A16_G32,W8A16_G32",
    )  # fmt: skip
    found = _bits(folder)
    experts: dict[str, set[int]] = {}
    for module, bits in found.items():
        if ".experts." in module:
            experts.setdefault(module.partition(".experts.")[0], set()).add(bits)
    assert experts
    assert all(len(bits) == 1 for bits in experts.values())


class Stopped(Exception):
    """Raised where events are shown."""


def test_a_stopped_run_goes_on_with_the_same_schemes(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("qwen3-moe")
    options: dict[str, Any] = {
        "to": "compressed-tensors", "group_size": 32, "method": "gptq", "calibrate": TEXT,
        "chunks": 2, "fisher_windows": 2, "allocate": True, "threads": 1,
        "allocate_from": "W3A16_G32,W4A16_G32,W5A16_G32",
    }  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    quantcli.quantize(source, whole, **options)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.what.startswith("layer 1"):
            raise Stopped

    with pytest.raises(Stopped):
        quantcli.quantize(source, stopped, on_event=stop, **options)
    assert not stopped.exists()
    asked: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, Progress):
            asked.append(event.what)

    quantcli.quantize(source, stopped, resume=True, on_event=watch, **options)
    assert not any("costs" in what or "sensitivity" in what for what in asked)
    for file in whole.iterdir():
        assert (stopped / file.name).read_bytes() == file.read_bytes(), file.name
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "stopped"}


def test_its_own_size_never_refuses_a_tiny_model(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A name for each type in the header is more than such a model's types can make up for."""
    options = {"type": "Q4_0", "calibrate": TEXT, "chunks": 2, "method": "nearest"}
    source = checkpoint("qwen3-moe")
    plain = quantcli.quantize(source, tmp_path / "plain.gguf", **options)
    made = quantcli.quantize(source, tmp_path / "m.gguf", allocate=True, **options)
    assert made.nbytes <= plain.nbytes
    assert any("own types stay" in note.message for note in made.notes)
    with pytest.raises(PlanError, match="bytes are too few"):
        quantcli.quantize(source, tmp_path / "no.gguf", target_size="10K", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"plain.gguf", "m.gguf"}


def test_types_of_expert_stacks_are_chosen_within_the_bits(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    import gguf

    source = checkpoint("qwen3-moe")
    made = quantcli.quantize(
        source, tmp_path / "m.gguf", type="Q8_0", method="nearest", calibrate=TEXT, chunks=2,
        target_bpw=5.3, allocate_from="Q4_0,Q5_0,Q8_0",
    )  # fmt: skip
    tensors = gguf.GGUFReader(made.paths[0]).tensors
    stacks = {t.name: t.tensor_type.name for t in tensors if "_exps" in t.name}
    assert set(stacks.values()) & {"Q4_0", "Q5_0"}
    bits = 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)
    assert bits <= 5.3
    assert made.bits_per_weight == pytest.approx(bits)


@pytest.mark.slow
def test_what_was_chosen_can_be_made_again(mini: Path, matrix: Path, tmp_path: Path) -> None:
    """The recipe in a folder, and in a GGUF, makes the same bytes."""
    first, again = tmp_path / "first", tmp_path / "again"
    quantcli.quantize(mini, first, to="gptq", imatrix=matrix, allocate=True)
    quantcli.quantize(mini, again, recipe=first, imatrix=matrix)
    for file in first.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    quantcli.quantize(mini, one, type="Q3_K_S", imatrix=matrix, allocate=True)
    quantcli.quantize(mini, two, recipe=one, imatrix=matrix)
    assert one.read_bytes() == two.read_bytes()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "quantcli.json").write_text("{}")
    with pytest.raises(UsageError, match="it records no recipe"):
        quantcli.quantize(mini, recipe=tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "awq", "allocate": True}, "--allocate is not for --to awq"),
        ({"to": "fp8", "target_bpw": 8.0}, "--target-bpw is not for --to fp8"),
        ({"to": "compressed-tensors", "target_bpw": 0.0}, "--target-bpw 0 is out of range"),
        (
            {"to": "compressed-tensors", "target_bpw": 5.0, "target_size": "3M"},
            "--target-size and --target-bpw both say",
        ),
        (
            {"to": "compressed-tensors", "allocate": True, "allocate_from": "W9A16"},
            "no 9-bit weights",
        ),
        ({"to": "mlx", "allocate": True, "allocate_from": "FP8_DYNAMIC"}, "has no scheme"),
        ({"allocate_from": "Q4_K"}, "add --allocate"),
        ({"allocate": True, "allocate_from": "Q4_G"}, "Q4_G"),
        ({"to": "compressed-tensors", "scheme": ["q_proj=W9A16_G7"]}, "no 9-bit weights"),
    ],
)
def test_refusals(options: dict[str, Any], said: str, mini: Path, matrix: Path) -> None:
    with pytest.raises(UsageError) as refused:
        quantcli.quantize(mini, imatrix=matrix, **options)
    assert said in f"{refused.value} {refused.value.hint}"


def test_without_costs_nothing_can_be_chosen(mini: Path) -> None:
    with pytest.raises(UsageError, match="needs to know what each choice costs"):
        quantcli.quantize(mini, to="gptq", allocate=True)


def test_too_few_bits_are_refused_with_those_that_do(
    mini: Path, matrix: Path, tmp_path: Path
) -> None:
    options = {"to": "compressed-tensors", "imatrix": matrix}
    with pytest.raises(PlanError, match="4 bits per weight are too few") as refused:
        quantcli.quantize(mini, tmp_path / "no", target_bpw=4.0, **options)
    needed = float(re.findall(r"ask for (\S+) or more", str(refused.value.hint))[0])
    made = quantcli.quantize(mini, tmp_path / "yes", target_bpw=needed, **options)
    assert made.bits_per_weight <= needed
    assert not (tmp_path / "no").exists()
