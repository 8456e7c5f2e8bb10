"""Every transform leaves every architecture's function alone, in transformers and in llama.cpp.

Scales are random and far from one, so a channel that is scaled once and not undone, or tied to
the wrong head, shows at once. What remains is float32's rounding of the changed weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.folds import random_folds, random_orders
from support.tiny_models import MODELS
from support.transformed_logits import transformers_logits

from quantcli.archs import find_folds
from quantcli.artifacts.gguf_file import prepare_gguf
from quantcli.artifacts.write import write_artifact
from quantcli.errors import ArchitectureError
from quantcli.model import Model, open_model
from quantcli.plan.recipe import Recipe
from quantcli.run.drop_mtp import drop_mtp
from quantcli.transforms.rotate import rotate
from quantcli.transforms.transformed_model import apply_transform

pytest.importorskip("torch")

IDS = np.random.default_rng(0).integers(2, 4000, 40).tolist()
NOISE = 2e-5
"""Of the logits' deviation; measured: at most 4e-6."""

STRUCTURES = [
    "llama", "llama-tied", "llama-biases", "mistral", "mixtral-stacked", "qwen2", "qwen3",
    "qwen3-moe", "gemma2", "gemma3-full", "phi3", "gpt2", "granite", "lfm2",
    "qwen35-mtp", "qwen35-moe", "qwen3-next-mtp", "deepseek-v2", "deepseek-v3", "minicpm3",
]  # fmt: skip
"""Models that differ in more than their rotation."""

LLAMA_NOISE = 1e-3
"""ggml sums in float32 and takes GELU from a table; measured: 1e-5, with GELU 3e-4."""


def read_whole(model: Model, name: str) -> NDArray[np.float32]:
    tensor = next(tensor for tensor in model.tensors if tensor.name == name)
    return model.read_floats(tensor, 0, tensor.rows)


@pytest.mark.parametrize("name", STRUCTURES)
def test_folding_every_group_keeps_the_logits_of_transformers(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    with open_model(checkpoint(name), vocabulary=False) as model:
        transform = random_folds(model)
        changed = apply_transform(model, transform)
        expected, found = (transformers_logits(one, IDS) for one in (model, changed))
    assert expected.std() > 1, "flat logits would hide a fault"
    assert np.abs(found - expected).max() / expected.std() < NOISE


@pytest.mark.parametrize("name", STRUCTURES)
def test_reordering_mlps_keeps_the_logits_of_transformers(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    with open_model(checkpoint(name), vocabulary=False) as model:
        transform = random_orders(model)
        assert bool(transform.rotations) == (name not in ("mixtral-stacked", "qwen3-moe", "gpt2"))
        changed = apply_transform(model, transform)
        expected, found = (transformers_logits(one, IDS) for one in (model, changed))
    assert np.abs(found - expected).max() / expected.std() < NOISE


@pytest.mark.parametrize("name", STRUCTURES)
def test_rotating_keeps_the_logits_of_transformers_or_is_refused(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    with open_model(checkpoint(name), vocabulary=False) as model:
        if find_folds(model.arch).basis or MODELS[name].beside:
            with pytest.raises(ArchitectureError, match="cannot be rotated, because"):
                rotate(model)
        if find_folds(model.arch).basis:
            return
        model = drop_mtp(model) if MODELS[name].beside else model
        changed = apply_transform(model, rotate(model, seed=3))
        expected, found = (transformers_logits(one, IDS) for one in (model, changed))
        weights = [read_whole(one, "blk.1.attn_output.weight") for one in (model, changed)]
    assert np.abs(found - expected).max() / expected.std() < NOISE
    assert np.abs(weights[1] - weights[0]).mean() > 0.5 * np.abs(weights[0]).mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_rotated_and_folded_files_give_llama_cpp_the_same_logits(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    from support.llama_logits import llama_logits

    logits = []
    with open_model(checkpoint(name)) as opened:
        # llama.cpp looks for tokens of Phi-3's own in a vocabulary of that name.
        keys = {k: v for k, v in opened.metadata.items() if k != "general.name"}
        model = changed = replace(opened, metadata=keys)
        folds = find_folds(model.arch)
        if not folds.rules:
            with pytest.raises(ArchitectureError, match="knows no fold groups of"):
                random_orders(model)
            return
        if not folds.basis and not MODELS[name].beside:
            changed = apply_transform(changed, rotate(changed))
        changed = apply_transform(changed, random_orders(changed))
        for number, one in enumerate((model, changed)):
            path = tmp_path / f"{number}.gguf"
            for _ in write_artifact(prepare_gguf(one, Recipe(type="F32"), path), threads=2):
                pass
            logits.append(llama_logits(path, IDS))
    assert np.abs(logits[1] - logits[0]).max() / logits[0].std() < LLAMA_NOISE
