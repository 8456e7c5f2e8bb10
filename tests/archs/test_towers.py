"""Vision towers: what llama.cpp sees in an image is what transformers sees, for every family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from support import tiny_models
from support.tiny_towers import NORMALISATION, TINY, WIDTH, build, heard, overheard

from quantcli import quantize
from quantcli.archs.towers import TOWERS

mtmd = pytest.importorskip("support.mtmd", reason="mtmd is the oracle for towers")
pytest.importorskip("transformers", reason="transformers is the oracle for towers")

SAME = {
    "InternVLChatModel": "InternVLForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration": "Glm4vForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration": "Qwen3VLForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3VLForConditionalGeneration",
}
"""Classes whose tower is another class's, to the last tensor."""


@pytest.fixture(scope="module")
def plain_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model as wide as those that the towers belong to."""
    folder = tmp_path_factory.mktemp("text")
    tiny_models.build("llama-tied", folder)
    return quantize(folder, folder / "text.gguf", type="F32").paths[0]


@pytest.mark.parametrize("name", TINY)
def test_llama_cpp_sees_what_transformers_sees(name: str, plain_text: Path, tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "model"
    model = build(name, folder)
    is_ear = TINY[name].look in (heard, overheard)
    seen = _sound(*TINY[name].image) if is_ear else _image(*TINY[name].image)
    with torch.no_grad():
        expected = TINY[name].look(model, seen).numpy()
    tower = quantize(folder, tmp_path / "tower.gguf", type="F32", mmproj_only=True).paths[0]
    text = plain_text
    if expected.shape[1] != WIDTH:
        text = quantize(folder, tmp_path / "text.gguf", type="F32").paths[0]

    embed = mtmd.embed_sound if is_ear else mtmd.embed_image
    found = embed(text, tower, seen)[: len(expected)]

    assert found.shape == expected.shape
    # llama.cpp clears the rows of [IMG_BREAK] by multiplying what was in memory by 0.
    sane = np.isfinite(found).all(axis=1)
    assert sane.mean() > (0.7 if TINY[name].token else 0.999)
    errors = (found - expected)[sane] / expected.std()
    # GELU and convolutions pass float16; a row or a sign that is wrong gives 0.1 and more.
    assert np.sqrt(np.square(errors).mean()) < 4e-3
    assert np.abs(errors).max() < 2e-2


def _image(rows: int, columns: int) -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def _sound(seconds: int, rate: int) -> NDArray[np.float32]:
    """A rising tone and noise."""
    time = np.arange(seconds * rate) / rate
    tone = 0.3 * np.sin(2 * np.pi * 440 * time * (1 + 0.1 * time))
    noise = 0.05 * np.random.default_rng(0).standard_normal(len(time))
    return (tone + noise).astype(np.float32)


PUBLISHED = {
    "gemma3": [("vision_tower.", "vision_tower.vision_model.")],
    "qwen2.5-vl": [("visual.", "model.visual.")],
    "qwen3-vl": [("model.visual.", "visual.")],
    "mistral3": [
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("language_model.model.", "model.language_model."),
    ],
    "llava": [("vision_tower.", "vision_tower.vision_model.")],
    "gemma4": [("model.vision_tower.", "vision_tower.")],
    "lfm2-vl": [("model.vision_tower.", "model.vision_tower.vision_model.")],
}
"""Beginnings of tensors' names as transformers saves them, and as others publish them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_other_spellings_make_the_same_file(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build(name, folder)
    first = quantize(folder, tmp_path / "a.gguf", mmproj_only=True).paths[0]
    tensors = load_file(folder / "model.safetensors")
    for old, new in PUBLISHED[name]:
        assert any(key.startswith(old) for key in tensors)
        tensors = {
            new + key.removeprefix(old) if key.startswith(old) else key: values
            for key, values in tensors.items()
        }
    save_file(tensors, folder / "model.safetensors")
    again = quantize(folder, tmp_path / "b.gguf", mmproj_only=True).paths[0]
    assert _tensors(again) == _tensors(first)


def _tensors(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}


CHAT_NAMES = {
    "vision_tower.embeddings": "vision_model.embeddings",
    "vision_tower.encoder.layer": "vision_model.encoder.layers",
    "cls_token": "class_embedding",
    "position_embeddings": "position_embedding",
    "patch_embeddings.projection": "patch_embedding",
    "attention.projection_layer": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_": "ls",
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
}
"""transformers' names of InternVL's tensors, and those of its authors' code."""


def test_internvl_in_its_authors_layout(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("internvl-biased", folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".attention.q_proj." in name]:
        parts = [tensors.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        fused = name.replace("attention.q_proj", "attn.qkv")
        tensors[fused] = np.concatenate(parts)
    for theirs, ours in CHAT_NAMES.items():
        tensors = {name.replace(theirs, ours): values for name, values in tensors.items()}
    expected = quantize(folder, tmp_path / "a.gguf", type="F32", mmproj=True, mmproj_type="F32")
    save_file(tensors, folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text(json.dumps(NORMALISATION))
    config |= {"architectures": ["InternVLChatModel"], "llm_config": config.pop("text_config")}
    config |= {"min_dynamic_patch": 1, "max_dynamic_patch": 2}
    (folder / "config.json").write_text(json.dumps(config))

    other = tmp_path / "other"
    other.mkdir()
    found = quantize(folder, other / "a.gguf", type="F32", mmproj=True, mmproj_type="F32")
    assert found.mmproj is not None
    assert expected.mmproj is not None
    for one, two in ((found.paths[0], expected.paths[0]), (found.mmproj, expected.mmproj)):
        mine, theirs = GGUFReader(one), GGUFReader(two)
        keys = {key for key in mine.fields if not key.startswith("quantcli.source")}
        assert keys == {key for key in theirs.fields if not key.startswith("quantcli.source")}
        for key in keys:
            assert mine.fields[key].contents() == theirs.fields[key].contents(), key
        values = {tensor.name: tensor.data for tensor in theirs.tensors}
        assert [tensor.name for tensor in mine.tensors] == list(values)
        for tensor in mine.tensors:
            np.testing.assert_array_equal(tensor.data, values[tensor.name])


def test_every_line_of_the_registry_is_tried() -> None:
    tried = {tiny.towered or tiny.model for tiny in TINY.values()}
    assert {name for name in TOWERS if name not in tried} == SAME.keys()
    for name, other in SAME.items():
        assert TOWERS.get(name) is TOWERS.get(other)
