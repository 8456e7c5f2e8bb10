"""The tables as such: complete, in llama.cpp's own words, and nothing used twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.gguf_models import materialise, read_config, read_stored
from support.tiny_models import ENCODERS, MODELS, TRANSLATORS

from quantcli.archs import ARCHITECTURES, find_architecture

CONVERTER = json.loads((Path(__file__).parent / "converter.json").read_text())
"""What llama.cpp's convert_hf_to_gguf (0c1e57098) writes for these checkpoints. Not in it:
"mixtral-stacked", whose layout it does not know, and "gemma3-full", whose layer_types it ignores.
"""

ADDED = {"vocab_size", "attention.key_length", "attention.value_length", "rope.freq_base"}
"""Keys that the converter leaves to llama.cpp's defaults for some architectures."""


NOT_IN_TRANSFORMERS = {
    "BailingMoeV2ForCausalLM", "InternLM3ForCausalLM", "XverseForCausalLM", "MiniCPMForCausalLM",
    "OrionForCausalLM", "InternLM2ForCausalLM", "DeciLMForCausalLM",
    "JinaBertModel", "JinaBertForMaskedLM",
}  # fmt: skip
"""Families whose class comes with the checkpoints alone (test_bailing.py, test_deci.py,
test_jina_bert.py, test_relatives.py)."""

NEXTN = {name for name in gguf.TENSOR_NAMES.values() if ".nextn." in name} | {
    gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ATTN_POST_NORM]
}
NEWER_KEYS = {
    "attention.indexer.types",
    "attention.recurrent_layers",
    "attention.value_scale",
    "attention.rope_pattern",
}
"""What the converter writes and gguf's last release does not list, for any or some architectures.
"""


def test_every_registered_family_has_a_tiny_model() -> None:
    built = [tiny.model for tiny in (MODELS | ENCODERS | TRANSLATORS).values()]
    families = [ARCHITECTURES.get(name) for name in built if name in ARCHITECTURES]
    for name in set(ARCHITECTURES) - NOT_IN_TRANSFORMERS:
        assert any(ARCHITECTURES.get(name) is family for family in families), name


@pytest.mark.parametrize("name", CONVERTER)
def test_keys_and_tensors_are_the_converters(name: str, checkpoint: Callable[..., Path]) -> None:
    config = read_config(checkpoint(name))
    architecture = find_architecture(config)
    keys = {
        key: np.float32(value.value) if value.kind == "f32" else value.value
        for key, value in architecture.metadata(config).items()
    }
    expected = CONVERTER[name]
    more = {key.split(".", 1)[1] for key in keys.keys() - expected["keys"].keys()}
    assert {key: keys[key] for key in expected["keys"]} == expected["keys"]
    assert more <= ADDED
    tensors = architecture.tensors(config, read_stored(checkpoint(name))[0])
    # ggml counts no leading axis of one, as the converter leaves at a single output.
    shapes = {
        name: shape[1:] if shape[0] == 1 else shape for name, shape in expected["tensors"].items()
    }
    assert {t.name: list(t.shape) for t in tensors} == shapes


@pytest.mark.parametrize("name", MODELS)
def test_names_are_ggufs_own(name: str, checkpoint: Callable[..., Path]) -> None:
    config = read_config(checkpoint(name))
    architecture = find_architecture(config)
    # The gguf package may be older than the llama.cpp that runs the model.
    arch = next((a for a, label in gguf.MODEL_ARCH_NAMES.items() if label == architecture.name), 0)
    known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS.get(arch, gguf.TENSOR_NAMES)}
    for tensor in architecture.tensors(config, read_stored(checkpoint(name))[0]):
        stem = re.sub(r"\.(weight|bias|scale)$", "", tensor.name)
        assert re.sub(r"^blk\.\d+\.", "blk.{bid}.", stem) in known | NEXTN
    keys = {key.split(".", 1)[1] for key in architecture.metadata(config)}
    assert keys <= _gguf_keys(gguf.Keys) | NEWER_KEYS


def _gguf_keys(holder: type) -> set[str]:
    found: set[str] = set()
    for label, value in vars(holder).items():
        if isinstance(value, type):
            found |= _gguf_keys(value)
        elif not label.startswith("_") and isinstance(value, str):
            found.add(value.removeprefix("{arch}."))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_stored_element_is_used_once(name: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(name)
    config = read_config(folder)
    infos, _ = read_stored(folder)
    used = {label: np.zeros(info.shape, np.int32).reshape(-1) for label, info in infos.items()}
    for tensor in find_architecture(config).tensors(config, infos):
        for piece in tensor.pieces:
            numbers = np.arange(infos[piece.source].elements).reshape(infos[piece.source].shape)
            found = replace(piece, pointwise=None).gather(numbers)
            assert found.shape == (piece.rows, tensor.columns)
            used[piece.source][found] += 1
        rows = sum(piece.rows for piece in tensor.pieces)
        assert rows == (0 if tensor.values is not None else tensor.rows)
    for label in find_architecture(config).key_places(config, infos):
        used[label] += 1
    left_out = (
        "vision_", "visual.", "projector", "mlp_AR", "audio_tower",
        "embed_vision", "embed_audio",
    )  # fmt: skip
    for label, times in used.items():
        assert (times == (0 if any(part in label for part in left_out) else 1)).all()


@pytest.mark.parametrize("stacked", ["mixtral-stacked", "qwen3-moe-stacked"])
def test_both_layouts_of_experts_give_the_same_tensors(
    stacked: str, checkpoint: Callable[..., Path]
) -> None:
    apart, together = (
        {t.name: materialise(t, arrays) for t in find_architecture(config).tensors(config, infos)}
        for config, infos, arrays in (
            (read_config(folder), *read_stored(folder))
            for folder in (checkpoint(stacked.removesuffix("-stacked")), checkpoint(stacked))
        )
    )
    assert apart.keys() == together.keys()
    assert all(np.array_equal(apart[key], together[key]) for key in apart)


def test_experts_may_be_stored_as_transformers_holds_them(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3-vl-moe")
    config, (infos, arrays) = read_config(folder), read_stored(folder)
    stacks = [name for name in infos if ".experts." in name]
    assert len(stacks) == 4
    turned = {name: np.ascontiguousarray(arrays[name].swapaxes(1, 2)) for name in stacks}
    shapes = {name: replace(infos[name], shape=array.shape) for name, array in turned.items()}
    published, ours = (
        {t.name: materialise(t, a) for t in find_architecture(config).tensors(config, i)}
        for i, a in ((infos, arrays), (infos | shapes, arrays | turned))
    )
    assert all(np.array_equal(published[key], ours[key]) for key in published)


def test_tensors_come_in_llamas_order(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("gemma3")
    config = read_config(folder)
    names = [t.name for t in find_architecture(config).tensors(config, read_stored(folder)[0])]
    assert names[:3] == ["output_norm.weight", "token_embd.weight", "blk.0.attn_k.weight"]
    assert [n for n in names if n.endswith("attn_q.weight")] == [
        f"blk.{i}.attn_q.weight" for i in range(6)
    ]
