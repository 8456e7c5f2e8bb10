"""Blocks in other layouts: each real consumer computes the very weights that gguf decodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from support import packed_layouts
from support.unpackers import unpack_gptq

import quantcli
from quantcli.errors import PlanError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402 - after the skip

NAMES = {
    "model.layers.1.mlp.down_proj": "blk.1.ffn_down.weight",
    "model.layers.3.self_attn.v_proj": "blk.3.attn_v.weight",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate.weight",
}
"""Modules whose rows GGUF does not permute, and their tensors."""


@pytest.fixture(scope="module")
def blocks(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``blocks(type)``: the small model with every matrix in that type."""
    folder = tmp_path_factory.mktemp("blocks")

    def file(kind: str) -> Path:
        path = folder / f"{kind}.gguf"
        if kind == "MXFP4" and not path.exists():
            every = ("attn=MXFP4", "ffn=MXFP4", "token_embd=MXFP4")
            quantcli.quantize(mini, path, type="Q8_0", tensor_types=every)
        elif kind == "NVFP4" and not path.exists():
            # By llama.cpp's rule there are no scales of whole tensors.
            quantcli.quantize(mini, path, type=kind, pure=True, range="minmax")
        elif not path.exists():
            quantcli.quantize(mini, path, type=kind, pure=True)
        return path

    return file


def decoded(file: Path) -> dict[str, NDArray[np.float32]]:
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type)
        for tensor in GGUFReader(file).tensors
    }


def grid(file: Path, name: str, bits: int) -> tuple[NDArray[Any], NDArray[np.float16]]:
    """Codes (out, in) and scales (out, groups) of a symmetric type, by gguf's own decoding."""
    tensor = next(t for t in GGUFReader(file).tensors if t.name == name)
    raw = tensor.data.reshape(-1, {4: 18, 8: 34}[bits])
    scales = np.ascontiguousarray(raw[:, :2]).view(np.float16)
    values = dequantize(tensor.data, tensor.tensor_type)
    rows = values.shape[0]
    steps = values.reshape(-1, 32) / np.where(scales == 0, 1, scales).astype(np.float32)
    codes = np.rint(steps).astype(np.int64) + (1 << (bits - 1))
    return codes.reshape(rows, -1), scales.reshape(rows, -1)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q8_0", 8)])
def test_compressed_tensors_in_transformers(
    kind: str, bits: int, blocks: Any, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    quantcli.export(blocks(kind), tmp_path / "ct", to="compressed-tensors")
    quantcli.export(blocks(kind), tmp_path / "hf", to="hf", dtype="f32")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ct",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    ).eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32
    ).eval()
    wanted, found = plain.state_dict(), model.state_dict()
    for name in NAMES:
        assert torch.equal(found[f"{name}.weight"], wanted[f"{name}.weight"]), name
    ids = torch.tensor([[5, 300, 7, 1200, 42]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    settings = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert settings["config_groups"]["group_0"]["weights"]["num_bits"] == bits


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_mxfp4_there_and_back(mini: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    (file,) = quantcli.quantize(
        mini, tmp_path / "m.gguf", type="Q8_0", tensor_types=("attn=MXFP4", "ffn=MXFP4")
    ).paths
    quantcli.export(file, tmp_path / "ct", to="compressed-tensors")
    quantcli.export(file, tmp_path / "hf", to="hf", dtype="f32")
    wanted = load_file(tmp_path / "hf" / "model.safetensors")
    found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ct",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    ).state_dict()
    for module in (*NAMES, "model.layers.2.self_attn.q_proj"):
        assert torch.equal(found[f"{module}.weight"], wanted[f"{module}.weight"]), module
    (back,) = quantcli.export(tmp_path / "ct", tmp_path / "back.gguf", to="gguf").paths
    before, after = decoded(file), decoded(back)
    stored = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(back).tensors}
    for name in NAMES.values():
        assert stored[name] == "MXFP4"
        assert np.array_equal(before[name], after[name]), name


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_mlx(kind: str, blocks: Any, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    quantcli.export(blocks(kind), tmp_path / "mlx", to="mlx")
    stored = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    settings = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    values = decoded(blocks(kind))
    for module, name in {**NAMES, "model.embed_tokens": "token_embd.weight"}.items():
        parts = [
            stored[f"{module}.{part}"].astype(mx.float32) if part != "weight" else
            stored[f"{module}.weight"]
            for part in ("weight", "scales", "biases")
        ]  # fmt: skip
        found = mx.dequantize(*parts, group_size=settings["group_size"], bits=settings["bits"])
        assert np.array_equal(np.array(found), values[name]), module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "kind"), [("llama", "Q4_0"), ("qwen3-moe", "Q8_0")])
def test_mlx_lm_runs_the_folder(name: str, kind: str, tmp_path: Path) -> None:
    """Experts too, which MLX wants stacked; products are in float16 or bfloat16 there."""
    mlx_lm = pytest.importorskip("mlx_lm")
    mx = pytest.importorskip("mlx.core")
    from support.tiny_models import build

    source = build(name, tmp_path / "model")
    (file,) = quantcli.quantize(source, tmp_path / "m.gguf", type=kind, pure=True).paths
    quantcli.export(file, tmp_path / "mlx", to="mlx")
    quantcli.export(file, tmp_path / "hf", to="hf", dtype="f32")
    ids = np.random.default_rng(2).integers(2, 4000, (1, 24))
    model, _ = mlx_lm.load(str(tmp_path / "mlx"))
    found = np.array(model(mx.array(ids)).astype(mx.float32))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.inference_mode():
        wanted = plain(torch.from_numpy(ids)).logits.numpy()
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.02


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q8_0", 8)])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(kind: str, bits: int, version: int, blocks: Any, tmp_path: Path) -> None:
    """The words that GPTQ's definition gives for gguf's codes."""
    to = "gptq" if version == 1 else "gptq-v2"
    quantcli.export(blocks(kind), tmp_path / "gptq", to=to)
    stored = load_file(tmp_path / "gptq" / "model.safetensors")
    module = "model.layers.3.self_attn.v_proj"
    codes, scales = grid(blocks(kind), NAMES[module], bits)
    zeros = np.full(scales.shape, 1 << (bits - 1))
    wanted = packed_layouts.gptq(codes, zeros, scales, bits, version=version)
    for part, words in wanted.items():
        assert np.array_equal(stored[f"{module}.{part}"].numpy(), words), part
    order = stored[f"{module}.g_idx"].numpy()
    assert order.tolist() == [column // 32 for column in range(256)]
    settings = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["group_size"], settings["desc_act"]) == (bits, 32, False)


def test_awq(blocks: Any, tmp_path: Path) -> None:
    quantcli.export(blocks("Q4_0"), tmp_path / "awq", to="awq")
    stored = load_file(tmp_path / "awq" / "model.safetensors")
    module = "model.layers.3.self_attn.v_proj"
    codes, scales = grid(blocks("Q4_0"), NAMES[module], 4)
    wanted = packed_layouts.awq(codes, np.full(scales.shape, 8), scales)
    for part, words in wanted.items():
        assert np.array_equal(stored[f"{module}.{part}"].numpy(), words), part


def test_permuted_rows_and_experts_are_put_back(tmp_path: Path) -> None:
    """A mixture with permuted heads: the folder, read again, is the GGUF, weight for weight."""
    from support.tiny_models import build

    from quantcli.exports.verify import verify

    folder = build("mixtral", tmp_path / "model")
    (file,) = quantcli.quantize(folder, tmp_path / "m.gguf", type="Q8_0", pure=True).paths
    quantcli.export(file, tmp_path / "hf", to="hf", dtype="f32")
    plain = load_file(tmp_path / "hf" / "model.safetensors")
    quantcli.export(file, tmp_path / "ct", to="compressed-tensors")
    stored = load_file(tmp_path / "ct" / "model.safetensors")
    for name in ("layers.1.self_attn.q_proj", "layers.0.block_sparse_moe.experts.3.w2"):
        words = stored[f"model.{name}.weight_packed"].numpy()
        codes = words.view(np.uint8).astype(np.float32) - 128
        scales = stored[f"model.{name}.weight_scale"].numpy().astype(np.float32)
        values = codes.reshape(*scales.shape, 32) * scales[..., None]
        assert np.array_equal(values.reshape(len(codes), -1), plain[f"model.{name}.weight"].numpy())
    with (
        quantcli.open_model(tmp_path / "ct") as model,
        quantcli.open_model(file, vocabulary=False) as source,
    ):
        *_, verdict = verify(model, source)
    assert (verdict.problems, verdict.overall.largest) == ((), 0.0)


def test_the_rest_of_the_folder(blocks: Any, mini: Path, tmp_path: Path) -> None:
    quantcli.export(blocks("Q4_0"), tmp_path / "gptq", to="gptq", split_max_size="3M")
    folder = tmp_path / "gptq"
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer("a dark night")["input_ids"]
        == (transformers.AutoTokenizer.from_pretrained(mini)("a dark night")["input_ids"])
    )
    assert json.loads((folder / "quantcli.json").read_text())["to"] == "gptq"
    card = (folder / "README.md").read_text()
    assert "int4 g32, the codes of Q4_0" in card
    assert "vllm serve gptq" in card


def test_what_would_round_is_refused(blocks: Any, mini: Path, tmp_path: Path) -> None:
    (mixed,) = quantcli.quantize(mini, tmp_path / "m.gguf", type="Q4_K_M").paths
    cases = [
        (blocks("Q4_1"), "awq", "is no whole number of scales"),
        (blocks("Q8_0"), "awq", r"is Q8_0, whose grid \(int8 g32\) --to awq does not have"),
        (blocks("Q5_0"), "gptq", "is Q5_0, whose grid .* --to gptq does not have"),
        (mixed, "gptq", r"\(Q4_K\) lies on no grid whose codes --to gptq holds"),
    ]
    for file, to, message in cases:
        with pytest.raises(PlanError, match=message) as caught:
            quantcli.export(file, tmp_path / "out", to=to)
        assert f"quantcli quantize --to {to}" in str(caught.value.hint)
        assert not (tmp_path / "out").exists()
    (two,) = quantcli.quantize(
        mini, tmp_path / "two.gguf", type="Q4_0", pure=True, tensor_types=("attn_v=Q8_0",)
    ).paths
    with pytest.raises(PlanError, match="is Q8_0, whose grid"):
        quantcli.export(two, tmp_path / "out", to="awq")
    (floats,) = quantcli.quantize(mini, tmp_path / "f.gguf", type="F16").paths
    with pytest.raises(PlanError, match="has no linear layer that is stored as codes"):
        quantcli.export(floats, tmp_path / "out", to="gptq")
    with pytest.raises(PlanError, match="--to fp8 does not have"):
        quantcli.export(two, tmp_path / "out", to="fp8")


def test_several_types_where_the_format_has_several_grids(mini: Path, tmp_path: Path) -> None:
    (two,) = quantcli.quantize(
        mini, tmp_path / "two.gguf", type="Q4_0", pure=True, tensor_types=("attn_v=Q8_0",)
    ).paths
    quantcli.export(two, tmp_path / "hf", to="hf", dtype="f32")
    wanted = load_file(tmp_path / "hf" / "model.safetensors")
    quantcli.export(two, tmp_path / "gptq", to="gptq")
    settings = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    stored = {
        name: tensor.numpy()
        for name, tensor in load_file(tmp_path / "gptq" / "model.safetensors").items()
    }
    for module, bits in (("self_attn.v_proj", 8), ("mlp.up_proj", 4)):
        name = f"model.layers.1.{module}"
        own = settings["dynamic"].get(f"+:^{name}$".replace(".", "\\."), settings)
        assert own["bits"] == bits
        found = unpack_gptq(stored, name, settings | own)
        assert np.array_equal(found, wanted[f"{name}.weight"].numpy())


@pytest.mark.parametrize("kind", ["MXFP4", "NVFP4"])
def test_small_floats_in_mlx(kind: str, blocks: Any, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    quantcli.export(blocks(kind), tmp_path / "mlx", to="mlx")
    stored = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    settings = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    assert settings["mode"] == kind.lower()
    for module, name in {**NAMES, "model.embed_tokens": "token_embd.weight"}.items():
        found = mx.dequantize(
            stored[f"{module}.weight"], stored[f"{module}.scales"], **settings, dtype=mx.float32
        )
        assert np.array_equal(np.array(found), decoded(blocks(kind))[name]), module


@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_nvfp4_in_compressed_tensors(search: str, mini: Path, tmp_path: Path) -> None:
    """The codes and block scales are the same; a tensor's scale becomes its reciprocal."""
    import ml_dtypes
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    (file,) = quantcli.quantize(
        mini, tmp_path / "m.gguf", type="NVFP4", pure=True, range=search
    ).paths
    done = quantcli.export(file, tmp_path / "ct", to="compressed-tensors")
    assert ("bit for bit" in done.summary) == (search == "minmax")
    stored = load_file(tmp_path / "ct" / "model.safetensors")
    held = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for module, name in NAMES.items():
        words = stored[f"{module}.weight_packed"]
        values = unpack_fp4_from_uint8(words, len(words), 2 * words.shape[1]).float().numpy()
        own = stored[f"{module}.weight_scale"].view(torch.uint8).numpy()
        blocks = held[name].data.reshape(-1, 36)
        assert np.array_equal(own.reshape(-1, 4), blocks[:, :4])
        scales = own.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        scales = scales / stored[f"{module}.weight_global_scale"].numpy()
        weights = (values.reshape(*scales.shape, 16) * scales[..., None]).reshape(values.shape)
        wanted = decoded(file)[name]
        scale = name.replace(".weight", ".scale")
        assert (scale in held) == (search == "mse")
        if search == "mse":
            wanted = wanted * held[scale].data
            assert np.allclose(weights, wanted, rtol=2.0**-22, atol=0)
        else:
            assert np.array_equal(weights, wanted)


def test_requantizing_takes_the_formats_usual_grid(mini: Path, tmp_path: Path) -> None:
    from quantcli.exports.verify import verify

    (mixed,) = quantcli.quantize(mini, tmp_path / "m.gguf", type="Q4_K_M").paths
    quantcli.export(mixed, tmp_path / "gptq", to="gptq", requantize=True)
    settings = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["group_size"]) == (4, 128)
    with (
        quantcli.open_model(tmp_path / "gptq") as model,
        quantcli.open_model(mixed, vocabulary=False) as source,
    ):
        *_, verdict = verify(model, source)
    assert verdict.problems == ()
    assert 0.02 < verdict.overall.relative < 0.12
    assert "rounded again from Q4_K and Q6_K" in (tmp_path / "gptq" / "README.md").read_text()
