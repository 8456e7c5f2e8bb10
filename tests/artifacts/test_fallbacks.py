"""Matrices that a group does not divide, and parts of what servers run as one, in model folders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_models import build
from support.unpackers import codes_in, unpack_gptq

import quantcli
from quantcli.errors import PlanError, UsageError
from quantcli.plan.fused import scheme_groups

pytest.importorskip("transformers")
from safetensors.torch import load_file

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A llama whose rows 128 divides, but for the 160 columns of ``down_proj``."""
    changes = {"hidden_size": 128, "intermediate_size": 160}
    return build("llama", tmp_path / "odd", changes=changes, dtype="bfloat16")


def stored(folder: Path) -> dict[str, Any]:
    return {name: tensor.float().numpy() if tensor.dtype.is_floating_point else tensor.numpy()
            for name, tensor in load_file(folder / "model.safetensors").items()}  # fmt: skip


def settings(folder: Path, key: str = "quantization_config") -> Any:
    return json.loads((folder / "config.json").read_text())[key]


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "awq", "mlx"])
def test_what_a_group_does_not_divide_is_kept_with_a_remark(
    to: str, odd: Path, tmp_path: Path
) -> None:
    done = quantcli.quantize(odd, tmp_path / "out", to=to, group_size=128)
    (note,) = (note for note in done.notes if "do not fit" in note.message)
    assert "groups of 128 do not divide 160 columns" in note.message
    assert DOWN.replace(".1.", ".0.") in note.message
    assert note.level == "warning"
    found, source = stored(tmp_path / "out"), stored(odd)
    assert np.array_equal(found[f"{DOWN}.weight"], source[f"{DOWN}.weight"])
    config = settings(tmp_path / "out")
    if to == "compressed-tensors":
        assert DOWN in config["ignore"]
    if to == "awq":
        assert DOWN in config["modules_to_not_convert"]
    if to in ("gptq", "awq"):
        assert "-:^model\\.layers\\.1\\.mlp\\.down_proj$" in config["dynamic"]


@pytest.mark.parametrize("to", ["gptq", "gptq-v2"])
def test_the_nearest_group_of_gptq_is_a_module_setting(to: str, odd: Path, tmp_path: Path) -> None:
    done = quantcli.quantize(odd, tmp_path / "out", to=to, on_fallback="nearest", bits=8)
    assert any("become int8 g32" in note.message for note in done.notes)
    config = settings(tmp_path / "out")
    own = {"bits": 8, "group_size": 32}
    assert config["group_size"] == 128
    assert config["dynamic"]["+:^model\\.layers\\.1\\.mlp\\.down_proj$"] == own
    found, source = stored(tmp_path / "out"), stored(odd)
    assert found[f"{DOWN}.scales"].shape == (5, 128)
    decoded = unpack_gptq(found, DOWN, config)
    weights = source[f"{DOWN}.weight"]
    assert np.abs(decoded - weights).max() < np.abs(weights).max() / 100
    with quantcli.open_model(tmp_path / "out") as model:
        kinds = {tensor.name: tensor.dtype for tensor in model.tensors}
    assert kinds["blk.1.ffn_down.weight"] == "GPTQ int8, groups of 32"
    assert kinds["blk.1.attn_k.weight"] == "GPTQ int8, per row"


def test_the_nearest_group_of_mlx_runs_in_mlx(odd: Path, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    quantcli.quantize(odd, tmp_path / "out", to="mlx", on_fallback="nearest", group_size=128)
    config = settings(tmp_path / "out", "quantization")
    assert config["group_size"] == 128
    assert config[DOWN] == {"group_size": 32, "bits": 4, "mode": "affine"}
    parts = mx.load(str(tmp_path / "out" / "model.safetensors"))
    found = mx.dequantize(
        *(parts[f"{DOWN}.{part}"] for part in ("weight", "scales", "biases")),
        group_size=32, bits=4,
    )  # fmt: skip
    wanted = stored(odd)[f"{DOWN}.weight"]
    assert np.abs(np.array(found.astype(mx.float32)) - wanted).max() < np.abs(wanted).max() / 6


def test_the_nearest_group_of_compressed_tensors_is_a_group_of_settings(
    odd: Path, tmp_path: Path
) -> None:
    quantcli.quantize(odd, tmp_path / "out", to="compressed-tensors", on_fallback="nearest")
    groups = settings(tmp_path / "out")["config_groups"].values()
    sizes = {group["weights"]["group_size"]: group["targets"] for group in groups}
    assert sizes.keys() == {128, 32}
    assert DOWN in sizes[32]
    words = stored(tmp_path / "out")
    codes = codes_in(words[f"{DOWN}.weight_packed"], 4).astype(np.float32) - 8
    scales = words[f"{DOWN}.weight_scale"]
    values = codes.reshape(*scales.shape, 32) * scales[..., None]
    wanted = stored(odd)[f"{DOWN}.weight"]
    assert np.abs(values.reshape(wanted.shape) - wanted).max() < np.abs(wanted).max() / 6


def test_awq_has_one_group_for_all(odd: Path, tmp_path: Path) -> None:
    quantcli.quantize(odd, tmp_path / "out", to="awq", on_fallback="nearest")
    assert settings(tmp_path / "out")["group_size"] == 32
    assert f"{DOWN}.qweight" in stored(tmp_path / "out")


def test_rows_that_no_group_divides_have_one_scale(tmp_path: Path) -> None:
    source = build(
        "llama", tmp_path / "m", changes={"hidden_size": 128, "intermediate_size": 132},
        dtype="bfloat16",
    )  # fmt: skip
    quantcli.quantize(source, tmp_path / "out", to="compressed-tensors", on_fallback="nearest")
    assert stored(tmp_path / "out")[f"{DOWN}.weight_scale"].shape == (128, 1)


def test_a_fallback_is_refused_on_demand(odd: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="do not divide the 160 columns") as caught:
        quantcli.quantize(odd, tmp_path / "out", to="gptq", on_fallback="error")
    hint = str(caught.value.hint)
    assert "--group-size 32 does" in hint
    quantcli.quantize(odd, tmp_path / "a", to="gptq", group_size=32, on_fallback="error")
    pattern = hint.partition("--keep '")[2].partition("'")[0]
    quantcli.quantize(odd, tmp_path / "b", to="gptq", keep=[pattern], on_fallback="error")
    with pytest.raises(UsageError, match="--on-fallback nearest is about a folder's groups"):
        quantcli.quantize(odd, tmp_path / "c.gguf", on_fallback="nearest")


def test_a_model_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    changes = {"hidden_size": 96, "intermediate_size": 96, "head_dim": 24}
    source = build("llama", tmp_path / "m", changes=changes, dtype="bfloat16")
    with pytest.raises(PlanError, match="do not divide the 96 columns"):
        quantcli.quantize(source, tmp_path / "out", to="gptq")


def test_which_modules_need_one_scheme() -> None:
    layer = "model.layers.0"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    modules = [
        f"{attention}.q_a_proj", f"{attention}.kv_a_proj_with_mqa", f"{attention}.q_b_proj",
        f"{layer}.linear_attn.in_proj_qkv", f"{layer}.linear_attn.in_proj_z",
        *(f"{mlp}.experts.{e}.{part}_proj" for e in (0, 1) for part in ("gate", "up", "down")),
        f"{mlp}.shared_experts.up_proj", f"{mlp}.shared_experts.gate_proj",
        f"{mlp}.shared_experts.down_proj",
    ]  # fmt: skip
    found = scheme_groups(modules)
    assert set(found[modules[0]]) == set(modules[:2])
    assert found[modules[2]] == (modules[2],)
    assert set(found[modules[3]]) == set(modules[3:5])
    assert set(found[modules[5]]) == set(modules[5:11])
    assert set(found[modules[11]]) == set(modules[11:13])
    assert found[modules[13]] == (modules[13],)


def test_mlx_runs_modules_by_themselves(mini: Path, tmp_path: Path) -> None:
    done = quantcli.quantize(mini, tmp_path / "out", to="mlx", keep=["k_proj"])
    assert not any("as one" in note.message for note in done.notes)
    found = stored(tmp_path / "out")
    assert "model.layers.0.self_attn.k_proj.scales" not in found
    assert "model.layers.0.self_attn.q_proj.scales" in found


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "awq", "fp8"])
def test_strict_widens_nothing(to: str, mini: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"--keep sets \S+k_proj apart from \S+q_proj"):
        quantcli.quantize(mini, tmp_path / "out", to=to, keep=["k_proj"], strict=True)
    quantcli.quantize(mini, tmp_path / "out", to=to, keep=["[qkv]_proj"], strict=True)


def test_strict_stops_at_what_a_reader_refuses(mini: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"to": "gptq", "symmetric": False}, "GPTQModel takes zero points of its own"),
        ({"to": "awq", "group_size": 8}, "GPTQModel runs groups of 32, 64, 128 and 256 only"),
        ({"to": "compressed-tensors", "symmetric": False}, "transformers loads asymmetric"),
        ({"to": "compressed-tensors", "group_size": "tensor"}, "one scale for a whole tensor"),
        ({"to": "compressed-tensors", "scheme": ["q_proj=W4A16", "W8A16"]}, "--scheme sets"),
    ]
    for options, sentence in cases:
        done = quantcli.quantize(mini, tmp_path / "out", dry_run=True, **options)
        assert done is not None
        with pytest.raises(PlanError, match=sentence):
            quantcli.quantize(mini, tmp_path / "out", strict=True, **options)
    for to in ("compressed-tensors", "gptq", "gptq-v2", "awq", "mlx"):
        quantcli.quantize(mini, tmp_path / "out", to=to, strict=True, dry_run=True)


def test_rounding_again_points_to_the_export_that_does_not(mini: Path, tmp_path: Path) -> None:
    quantcli.quantize(mini, tmp_path / "ct", to="compressed-tensors")
    command = f"quantcli export {tmp_path / 'ct'} --to gptq"
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"to": "gptq"}, True),
        ({"to": "gptq", "group_size": 64}, False),
        ({"to": "gptq", "bits": 8}, False),
        ({"to": "compressed-tensors", "scheme": ["FP8_BLOCK"]}, False),
    ]
    for options, is_same in cases:
        done = quantcli.quantize(tmp_path / "ct", tmp_path / "out", dry_run=True, **options)
        (note,) = (n for n in done.notes if "rounded a second time" in n.message)
        assert (command in note.message) == is_same
    quantcli.export(tmp_path / "ct", tmp_path / "out", to="gptq")


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_kept_experts_are_named_as_vllm_does(to: str, tmp_path: Path) -> None:
    """vLLM matches the name of a layer's experts, GPTQModel that of each matrix."""
    source = build("qwen3-moe", tmp_path / "moe", dtype="bfloat16")
    quantcli.quantize(
        source, tmp_path / "out", to=to, group_size=32, keep=[r"layers\.1\..*experts\.2\.up"]
    )
    config = settings(tmp_path / "out")
    layer = "model.layers.1.mlp.experts"
    patterns = [re.compile(p.removeprefix("-:")) for p in config["dynamic"]]
    for name in (layer, f"{layer}.3.down_proj", f"{layer}.routed_experts"):
        assert any(pattern.match(name) for pattern in patterns)
        assert not any(pattern.match(name.replace(".1.", ".0.")) for pattern in patterns)
    if to == "awq":
        assert any(entry in layer for entry in config["modules_to_not_convert"])


def test_nearest_groups_are_those_of_all_experts_of_a_layer(tmp_path: Path) -> None:
    """Whatever each of them needs; what most modules have stands for all that are not named."""
    changes = {"hidden_size": 128, "moe_intermediate_size": 96}
    source = build("qwen3-moe", tmp_path / "moe", changes=changes, dtype="bfloat16")
    quantcli.quantize(source, tmp_path / "out", to="gptq", on_fallback="nearest")
    config = settings(tmp_path / "out")
    assert config["group_size"] == 32
    # vLLM looks for the settings of the fused matrix.
    own = {"bits": 4, "group_size": 128}
    assert config["dynamic"]["+:^model\\.layers\\.1\\.self_attn\\.qkv_proj$"] == own
    found = stored(tmp_path / "out")
    assert found["model.layers.1.mlp.experts.0.up_proj.scales"].shape[0] == 4
    assert found["model.layers.1.mlp.experts.0.down_proj.scales"].shape[0] == 3
    assert found["model.layers.1.self_attn.q_proj.scales"].shape[0] == 1
