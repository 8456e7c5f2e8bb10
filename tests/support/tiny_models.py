"""Tiny models of every architecture, with random weights, as transformers itself saves them.

Each is a folder of config.json, model.safetensors and the tokenizer of tests/data/bookworm-mini,
whose vocabulary size they all have. Weights are drawn wide enough that logits are not flat: a
swapped row or a wrong rotation shows at once. The configurations are those of every module of
`support.tiny`.
"""

from __future__ import annotations

import copy
import importlib
import math
import pkgutil
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support import tiny
from support.tiny.base import Tiny
from support.tiny.untabled import UNTABLED

TOKENIZER = Path(__file__).parent.parent / "data" / "bookworm-mini"

MODELS: dict[str, Tiny] = {}
ENCODERS: dict[str, Tiny] = {}
"""Models that make embeddings or scores and no logits of tokens."""
TRANSLATORS: dict[str, Tiny] = {}
"""Models whose decoder reads what an encoder made of another text."""
for _module in sorted(pkgutil.iter_modules(tiny.__path__), key=lambda module: module.name):
    _group = importlib.import_module(f"support.tiny.{_module.name}")
    MODELS |= getattr(_group, "MODELS", {})
    ENCODERS |= getattr(_group, "ENCODERS", {})
    TRANSLATORS |= getattr(_group, "TRANSLATORS", {})


def build(
    name: str, folder: Path, *, dtype: str = "float32", seed: int = 1,
    changes: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write the checkpoint of a model of one of the tables here into ``folder``.

    Its dtype is float32 or bfloat16; ``changes`` replaces settings of its configuration.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tiny = (MODELS | ENCODERS | TRANSLATORS | UNTABLED)[name]
    config_class = tiny.config_class or tiny.model.replace("ForCausalLM", "Config").replace(
        "ForConditionalGeneration", "Config"
    ).replace("LMHeadModel", "Config")
    # Some classes change the dictionaries that they are given.
    settings = copy.deepcopy(tiny.config | dict(changes or {}))
    config = getattr(transformers, config_class)(**settings)
    model = getattr(transformers, tiny.model)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for label, weight in model.named_parameters():
            weight.copy_(draw(label, weight, generator))
        stored = model.state_dict()
        for label, buffer in model.named_buffers():
            if label in stored and label.endswith(("bias", "layer_scalar")):
                buffer.copy_(draw(label, buffer, generator))
    with warnings.catch_warnings():
        # Llama 4's vision tower keeps its rotation in complex numbers.
        warnings.filterwarnings("ignore", message="Casting complex values to real")
        model.to(getattr(torch, dtype)).save_pretrained(folder, **tiny.save)
    if tiny.turned:
        _turn_experts(folder / "model.safetensors")
    if tiny.beside:
        _add(folder / "model.safetensors", tiny.beside, getattr(torch, dtype), generator)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder / file)
    return folder


def _add(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: Any, generator: Any) -> None:
    """Write further random tensors into a file of safetensors."""
    import torch
    from safetensors.torch import load_file, save_file

    added = {
        name: draw(name, torch.zeros(shape), generator).to(dtype) for name, shape in shapes.items()
    }
    save_file({**load_file(file), **added}, file, metadata={"format": "pt"})


def _turn_experts(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {
        name: value.transpose(1, 2).contiguous() if ".experts." in name else value
        for name, value in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def draw(label: str, weight: Any, generator: Any) -> Any:
    """Values for a parameter, as wide as its name asks for."""
    import torch

    noise = torch.randn(weight.shape, generator=generator)
    if label.endswith("linear_attn.A_log"):
        # A state that is forgotten at once is divided by a norm of nearly nothing.
        return -2 + 0.5 * noise
    if label.endswith("bias"):
        return 0.2 * noise
    if weight.ndim == 1:
        # Gemma's norms multiply by 1 + weight, so theirs are around 0 already.
        return weight.round() + 0.2 * noise
    if "embed" in label or "wte" in label or "wpe" in label:
        return 0.5 * noise
    if label.endswith("Attention.q.weight"):
        # T5 does not divide by a head's size, and sharp attention would show every rounding.
        noise = 0.25 * noise
    return 1.5 / math.sqrt(weight.shape[-1]) * noise
