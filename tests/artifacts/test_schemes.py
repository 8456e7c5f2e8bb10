"""Folders of named schemes: the containers of compressed-tensors, and logits in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantcli
from quantcli.errors import PlanError, UsageError
from quantcli.formats import native
from quantcli.layouts.base import is_static
from quantcli.layouts.compressed_tensors.presets import PRESETS
from quantcli.model import open_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = np.random.default_rng(0).integers(2, 4000, 64).tolist()
ACTIVATIONS = 0.03
"""Of the logits' norm, what a runtime's rounding of activations may change."""
STATIC = [name for name, preset in PRESETS.items() if is_static(preset.inputs)]
TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"
OWN = {"W8A8_ASYM", "W8A8_STATIC", "W8A8_STATIC_ASYM"}
"""Names that the library has not, for settings that it has."""
LOADED = [name for name in PRESETS if PRESETS[name].grid.symmetric]
"""transformers decodes asymmetric weights on request only."""
FOUR_BITS = 0.15
"""The same of activations of four bits; measured: 0.10."""


def make(source: Path, folder: Path, *schemes: str, **options: Any) -> Path:
    if any(name in STATIC for name in schemes):
        options = {"calibrate": TEXT, "chunks": 2} | options
    return quantcli.quantize(
        source, folder, to="compressed-tensors", scheme=schemes, **options
    ).paths[0]


def settings(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(folder / "model.safetensors")
    return found


def logits(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].float()


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in OWN])
def test_settings_are_the_librarys_preset(name: str, mini: Path, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    found = settings(make(mini, tmp_path / "out", name))
    (group,) = QuantizationConfig.model_validate(found).config_groups.values()
    wanted = preset_name_to_scheme(name, ["Linear"])
    for ours, theirs in (
        (group.weights, wanted.weights), (group.input_activations, wanted.input_activations),
    ):  # fmt: skip
        assert (ours is None) == (theirs is None)
        for key in ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic",
                    "block_structure", "scale_dtype", "zp_dtype", "observer"):  # fmt: skip
            if ours is not None and not (key == "zp_dtype" and theirs.scale_dtype is None):
                assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize(
    "name", ["FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16", "W4A16", "W8A8"]
)
def test_tensors_are_those_of_the_librarys_compressor(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Of float32 weights, by the references' rule, each container whole."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    source = checkpoint("llama")
    folder = make(source, tmp_path / "out", name, range="minmax")
    found, stored = tensors(folder), tensors(source)
    form = settings(folder)["config_groups"]["group_0"]["format"]
    scheme = preset_name_to_scheme(name, ["Linear"])
    scheme.format = form
    args, block = scheme.weights, "model.layers.1."
    fused = [f"{block}self_attn.{part}_proj" for part in "qkv"]
    for module in (*fused[:1], f"{block}mlp.down_proj"):
        weight = stored[f"{module}.weight"]
        size = args.group_size or weight.shape[1]
        groups = weight.reshape(len(weight), -1, size)
        if args.strategy == "block":
            tall, wide = len(weight) // 128, weight.shape[1] // 128
            groups = weight.reshape(tall, 128, wide, 128).transpose(1, 2).reshape(tall, wide, -1)
        given = {"weight": weight}
        whole = None
        if name == "NVFP4A16":
            own = fused if module in fused else [module]
            most = max(stored[f"{part}.weight"].abs().max() for part in own)
            whole = given["weight_global_scale"] = generate_gparam(-most, most)
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=whole)
        given["weight_scale"] = scale
        compressor = BaseCompressor.get_value_from_registry(form)
        for part, tensor in compressor.compress(given, scheme).items():
            ours = found[f"{module}.{part}"]
            if tensor.dtype == torch.float8_e4m3fn:
                ours, tensor = ours.view(torch.uint8), tensor.view(torch.uint8)
            assert ours.dtype == tensor.dtype, part
            assert torch.equal(ours.reshape(-1), tensor.reshape(-1)), part


@pytest.mark.parametrize("name", LOADED)
def test_transformers_computes_with_the_decoded_weights(
    name: str, mini: Path, tmp_path: Path
) -> None:
    folder = make(mini, tmp_path / "out", name)
    decoded = quantcli.quantize(folder, tmp_path / "decoded", to="hf", type="F32").paths[0]
    found, expected = logits(folder), logits(decoded)
    error = float((found - expected).norm() / expected.norm())
    if PRESETS[name].inputs is None:
        assert error == 0
    else:
        assert 0 < error < (FOUR_BITS if PRESETS[name].inputs["num_bits"] == 4 else ACTIVATIONS)


@pytest.mark.parametrize(
    ("activations", "bits", "name"),
    [("int8", 4, "W4A8"), ("fp8", 4, "W4AFP8"), ("fp8", 8, "FP8_DYNAMIC"), ("int8", 8, "W8A8")],
)
def test_bits_and_activations_say_a_scheme(
    activations: str, bits: int, name: str, mini: Path, tmp_path: Path
) -> None:
    short = quantcli.quantize(
        mini, tmp_path / "short", to="compressed-tensors", bits=bits, activations=activations
    ).paths[0]
    named = make(mini, tmp_path / "named", name)
    assert settings(short) == settings(named)
    one, other = tensors(short), tensors(named)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key].float(), other[key].float()) for key in one)


def test_schemes_of_some_modules(mini: Path, tmp_path: Path) -> None:
    """FP4 for one part, FP8 for another; what no pattern names stays as it is."""
    folder = make(mini, tmp_path / "out", r"mlp\.=NVFP4A16", "layers.0.self_attn=fp8_dynamic")
    found = settings(folder)
    groups = found["config_groups"]
    assert found["format"] == "mixed-precision"
    assert [group["format"] for group in groups.values()] == [
        "float-quantized", "nvfp4-pack-quantized",
    ]  # fmt: skip
    assert "model.layers.0.self_attn.o_proj" in groups["group_0"]["targets"]
    assert "model.layers.1.self_attn.q_proj" in found["ignore"]
    assert tensors(folder)["model.layers.1.self_attn.q_proj.weight"].dtype == torch.bfloat16
    decoded = quantcli.quantize(folder, tmp_path / "decoded", to="hf", type="F32").paths[0]
    expected = logits(decoded)
    assert float((logits(folder) - expected).norm() / expected.norm()) < ACTIVATIONS


def test_parts_of_a_fused_matrix_share_a_scheme(mini: Path, tmp_path: Path) -> None:
    done = quantcli.quantize(
        mini, tmp_path / "out", to="compressed-tensors", scheme=["q_proj=NVFP4A16", "W4A16"]
    )
    groups = settings(done.paths[0])["config_groups"].values()
    targets = {group["weights"]["type"]: group["targets"] for group in groups}
    assert "model.layers.0.self_attn.v_proj" in targets["float"]
    assert any("8 modules have the scheme of what vLLM" in note.message for note in done.notes)


def test_parts_of_a_fused_matrix_are_left_alone_together(mini: Path, tmp_path: Path) -> None:
    done = quantcli.quantize(
        mini, tmp_path / "out", to="compressed-tensors", scheme=["k_proj=UNQUANTIZED", "W4A16"]
    )
    ignored = settings(done.paths[0])["ignore"]
    for part in "qkv":
        assert f"model.layers.0.self_attn.{part}_proj" in ignored
    assert "model.layers.0.mlp.up_proj" not in ignored


def test_gptq_on_fp4_halves_the_divergence(mini: Path, tmp_path: Path) -> None:
    novel = Path(__file__).parent.parent / "data" / "pride-and-prejudice.txt"
    nearest = make(mini, tmp_path / "nearest", "NVFP4A16")
    fed = make(mini, tmp_path / "gptq", "NVFP4A16", method="gptq", calibrate=[], chunks=16)
    found = quantcli.evaluate(
        [nearest, fed], novel, reference=mini, ctx=128, chunks=8, engine="torch"
    )
    before, after = (result["kld"]["value"] for result in found.document["results"])
    assert after < 0.6 * before


@pytest.mark.parametrize(
    ("schemes", "options", "sentence"),
    [
        (["FP8_DYNAMICS"], {}, "has no scheme 'FP8_DYNAMICS'"),
        (["nowhere=NVFP4A16"], {}, "matches no linear module"),
        (["(=NVFP4A16"], {}, "no regular expression"),
        (["W4A16", "mlp=NVFP4A16"], {}, "comes last"),
        (["FP8_DYNAMIC"], {"bits": 4}, "--bits and --scheme FP8_DYNAMIC both say"),
    ],
)
def test_what_is_refused(
    schemes: list[str], options: dict[str, Any], sentence: str, mini: Path, tmp_path: Path
) -> None:
    with pytest.raises((UsageError, PlanError), match=sentence):
        make(mini, tmp_path / "out", *schemes, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_mlx_modes_are_mlxs_own(mode: str, mini: Path, tmp_path: Path) -> None:
    """Of its rule the bytes, of the searched scales the decoded weights."""
    mx = pytest.importorskip("mlx.core")
    source = mx.load(str(mini / "model.safetensors"))
    for search in ("minmax", "mse"):
        folder = quantcli.quantize(
            mini, tmp_path / search, to="mlx", scheme=[mode], range=search
        ).paths[0]
        found = mx.load(str(folder / "model.safetensors"))
        config = json.loads((folder / "config.json").read_text())
        assert config["quantization"]["mode"] == mode
        module = "model.layers.1.self_attn.q_proj"
        ours = found[f"{module}.weight"], found[f"{module}.scales"]
        weight = source[f"{module}.weight"].astype(mx.float32)
        if search == "minmax":
            for part, theirs in zip(ours, mx.quantize(weight, mode=mode), strict=True):
                assert mx.array_equal(part, theirs)
        decoded = np.array(mx.dequantize(*ours, mode=mode).astype(mx.float32))
        with open_model(folder, vocabulary=False) as model:
            read = native.to_float32(model.store.read_rows(f"{module}.weight", 0, len(decoded)))
        # mlx decodes to bfloat16.
        assert np.allclose(read, decoded, rtol=2**-8)


def test_fp8_is_the_form_of_deepseek(mini: Path, tmp_path: Path) -> None:
    """Codes times ``weight_scale_inv`` by block, as its ``weight_dequant`` has it."""
    folder = quantcli.quantize(mini, tmp_path / "fp8", to="fp8").paths[0]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["weight_block_size"]) == ("fp8", [128, 128])
    assert "lm_head" in config["modules_to_not_convert"]
    stored, module = tensors(folder), "model.layers.0.mlp.up_proj"
    scale = stored[f"{module}.weight_scale_inv"]
    weight = tensors(mini)[f"{module}.weight"].float()
    assert torch.equal(scale[0, 0], weight[:128, :128].abs().max() / 448)
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    rows, columns = weight.shape
    expected = stored[f"{module}.weight"].float() * spread[:rows, :columns]
    assert float((expected - weight).norm() / weight.norm()) < 0.03
    decoded = quantcli.quantize(folder, tmp_path / "decoded", to="hf", type="F32").paths[0]
    assert torch.equal(tensors(decoded)[f"{module}.weight"], expected)
