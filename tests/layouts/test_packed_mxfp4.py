"""gpt-oss' experts in MXFP4: decoded as transformers does, and copied into GGUF code by code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import quantcli
from quantcli.errors import SourceError
from quantcli.model import open_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

EXPERTS = ("gate_up_proj", "down_proj")
LAYER = "model.layers.{}.mlp.experts.{}"
HALVES = {"ffn_gate_exps": ("gate_up_proj", slice(0, None, 2)),
          "ffn_up_exps": ("gate_up_proj", slice(1, None, 2)),
          "ffn_down_exps": ("down_proj", slice(None))}  # fmt: skip


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """The tiny gpt-oss with random codes for its experts, as OpenAI publishes them."""
    found = tmp_path / "blocks"
    found.mkdir()
    source = checkpoint("gpt-oss", "bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (found / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    (found / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    rng = np.random.default_rng(5)
    for layer in range(2):
        for name in EXPERTS:
            weight = tensors.pop(LAYER.format(layer, name))
            experts, inputs, outputs = weight.shape
            blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
            # Small codes alone: a float's way back would take another scale for them.
            blocks[0] &= 0x99
            scales = rng.integers(118, 124, blocks.shape[:-1]).astype(np.uint8)
            tensors[LAYER.format(layer, name) + "_blocks"] = torch.from_numpy(blocks)
            tensors[LAYER.format(layer, name) + "_scales"] = torch.from_numpy(scales)
    save_file(tensors, found / "model.safetensors", metadata={"format": "pt"})
    return found


def _decoded(folder: Path, layer: int, name: str) -> NDArray[np.float32]:
    """transformers' own decoding: (experts, inputs, outputs)."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = load_file(folder / "model.safetensors")
    stem = LAYER.format(layer, name)
    values = convert_moe_packed_tensors(tensors[f"{stem}_blocks"], tensors[f"{stem}_scales"])
    found: NDArray[np.float32] = values.float().numpy()
    return found


def test_rows_are_transformers_own(folder: Path) -> None:
    with open_model(folder) as model:
        for name in EXPERTS:
            expected = _decoded(folder, 1, name)
            stem, rows = LAYER.format(1, name), expected.shape[0] * expected.shape[1]
            flat = expected.reshape(rows, -1)
            assert np.array_equal(model.store.read_rows(stem, 0, rows), flat)
            assert np.array_equal(model.store.read_rows(stem, 41, 107), flat[41:107])


def _pack_one(codes: NDArray[np.uint8], scale: int) -> bytes:
    """ggml's block_mxfp4 of 32 codes, as its struct says: e, then codes j and j + 16."""
    return bytes([scale, *(int(codes[j]) | int(codes[j + 16]) << 4 for j in range(16))])


def test_codes_are_copied_where_the_type_is_mxfp4(folder: Path, tmp_path: Path) -> None:
    done = quantcli.quantize(folder, tmp_path / "m.gguf", type="MXFP4_MOE")
    assert not any("second time" in note.message for note in done.notes)
    file = done.paths[0]
    exported = quantcli.export(folder, tmp_path / "e.gguf", to="gguf").paths[0]
    tensors = load_file(folder / "model.safetensors")
    for path in (file, exported):
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for kind, (name, rows) in HALVES.items():
            held = found[f"blk.1.{kind}.weight"]
            assert held.tensor_type == gguf.GGMLQuantizationType.MXFP4
            stem = LAYER.format(1, name)
            blocks = tensors[f"{stem}_blocks"].numpy()[:, rows]
            scales = tensors[f"{stem}_scales"].numpy()[:, rows]
            codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:3], 32)
            for at in ((0, 0, 0), (1, 5, 1), (3, blocks.shape[1] - 1, blocks.shape[2] - 1)):
                block = held.data.reshape(*scales.shape, 17)[at]
                assert bytes(block) == _pack_one(codes[at], int(scales[at]))
            expected = _decoded(folder, 1, name).transpose(0, 2, 1)[:, rows]
            assert np.array_equal(gguf.quants.dequantize(held.data, held.tensor_type), expected)
    assert found["blk.0.attn_q.weight"].tensor_type == gguf.GGMLQuantizationType.BF16


def test_another_type_decodes_them(folder: Path, tmp_path: Path) -> None:
    done = quantcli.quantize(folder, tmp_path / "m.gguf", type="Q4_0")
    assert any("--type MXFP4_MOE copies them" in note.message for note in done.notes)
    decoded = quantcli.quantize(folder, tmp_path / "hf", to="hf", type="F32").paths[0]
    again = quantcli.quantize(decoded, tmp_path / "again.gguf", type="Q4_0").paths[0]
    one, other = (gguf.GGUFReader(path).tensors for path in (done.paths[0], again))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(one, other, strict=True))
    model = transformers.GptOssForCausalLM.from_pretrained(decoded, dtype=torch.float32)
    weights = model.model.layers[0].mlp.experts.down_proj.detach().numpy()
    assert np.array_equal(weights, _decoded(folder, 0, "down_proj"))


def test_logits_are_those_of_the_decoded_model(folder: Path, tmp_path: Path) -> None:
    from support.llama_logits import llama_logits

    decoded = quantcli.quantize(folder, tmp_path / "hf", to="hf", type="F32").paths[0]
    tokens = np.random.default_rng(0).integers(2, 4000, 48).tolist()
    file = quantcli.quantize(folder, tmp_path / "m.gguf", type="F32").paths[0]
    model = transformers.GptOssForCausalLM.from_pretrained(
        decoded, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    found = llama_logits(file, tokens)
    assert np.abs(found - expected).max() / expected.std() < 1e-3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [("missing", "there is no 'model.layers.0.mlp.experts.down_proj_scales'"),
     ("shape", "has shape .* expected")],
)  # fmt: skip
def test_incomplete_blocks_are_refused(folder: Path, change: str, sentence: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = LAYER.format(0, "down_proj_scales")
    scales = tensors.pop(name)
    if change == "shape":
        tensors[name] = scales[:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=sentence):
        open_model(folder)
