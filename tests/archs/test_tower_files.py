"""Files of vision and audio towers: spellings, layouts, and what is refused in one sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file
from support.tiny_towers import NORMALISATION, TINY, build

from quantcli import quantize
from quantcli.archs.towers import TOWERS, Wrapper, find_tower
from quantcli.errors import QuantcliError
from quantcli.sources.hf import open_checkpoint

pytest.importorskip("transformers", reason="transformers makes the wrappers")

SAME = {
    "InternVLChatModel": "InternVLForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration": "Glm4vForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration": "Qwen3VLForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3VLForConditionalGeneration",
}
"""Classes whose tower is another class's, to the last tensor."""


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


ODD = (None, -1, 0, 7, "x", [], [1, 2], {}, 1.5, True, 10**12)


def _mutated(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Copies of a configuration with one setting of its towers odd or missing."""
    places = [(section, key) for section in ("vision_config", "audio_config")
              for key in config.get(section) or ()]  # fmt: skip
    for section, key in [*places, *((None, key) for key in config)]:
        for value in (*ODD, ...):
            changed = copy.deepcopy(config)
            owner = changed if section is None else changed[section]
            owner[key] = value
            if value is ...:
                del owner[key]
            yield changed


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_odd_configurations_are_read_or_refused(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    store = open_checkpoint(tmp_path)
    refused = 0
    for config in _mutated(store.config):
        try:
            tower, wrapper = find_tower(config), Wrapper(config, processor, lambda text: 9)
            tower.tensors(wrapper, store.tensors)
            tower.metadata(wrapper)
            tower.read_notes(wrapper)
        except QuantcliError:
            refused += 1
    store.close()
    assert refused > 50
