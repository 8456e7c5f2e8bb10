"""The inputs of the frozen commands: models, an importance matrix, a text and a recipe.

All of them are the same bytes on every machine. Weights and importance are uniform draws, made of
integers by multiplications alone, so that no math library takes part.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from support import tiny_models

TESTS = Path(__file__).parents[1]
MINI = TESTS / "data" / "bookworm-mini"

_WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 32,
}  # fmt: skip
_TIED = {"tie_word_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # 256 columns: no type falls back.
    "llama": ("llama", {"intermediate_size": 256}),
    "moe": ("mixtral", _WIDE | {"num_hidden_layers": 3}),
    "gemma": ("gemma3", _WIDE),
    # 64 and 96 columns: types of blocks of 256 fall back, and runs are short.
    "small": ("llama", {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16} | _TIED),
    "biases": ("llama-biases", {}),
    "llama3": ("llama-llama3", {}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {"intermediate_size": 128}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3moe": ("qwen3-moe", {}),
    "stacked": ("qwen3-moe-stacked", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {"num_hidden_layers": 2, "layer_types": None}),
    "phi": ("phi3", {}),
    "phi-long": ("phi3-longrope", {}),
    "gpt2": ("gpt2", {}),
}
"""Folders, the models of `support.tiny_models` that they hold, and the settings changed.

The folder of a Phi-3 must not be named so: llama.cpp takes that for a promise about its tokens.
"""

_RECIPE = """\
type = "Q5_K_S"
tensor_types = ["attn_v=Q8_0"]
override_kv = ["general.name=str:by recipe"]
keep = ["last=Q6_K"]
"""


def write_input(name: str, root: Path) -> None:
    """Write the file or folder ``name`` into ``root``, unless it is there; KeyError if unknown."""
    path = root / name
    if path.exists():
        return
    if name == "mini":
        shutil.copytree(MINI, path)
    elif name == "text.txt":
        shutil.copy(TESTS / "golden" / "calibration.txt", path)
    elif name == "recipe.toml":
        path.write_text(_RECIPE)
    elif name == "importance.dat":
        _write_importance(path)
    else:
        _write_model(path, *MODELS[name])


def is_input(name: str) -> bool:
    """Whether `write_input` knows the name."""
    return name in MODELS or name in ("mini", "text.txt", "recipe.toml", "importance.dat")


def _draw(label: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Numbers of mean 0 and variance 1 that only the label and the shape decide."""
    count = int(np.prod(shape))
    raw = np.random.PCG64(crc32(label.encode())).random_raw(count)
    unit = (raw >> np.uint64(40)).astype(np.float64) * 2.0**-24
    return ((unit - 0.5) * 3.4641016151377544).reshape(shape)


def _write_model(folder: Path, model: str, changes: dict[str, Any]) -> None:
    """The model as transformers saves it, with other weights and without its version."""
    from safetensors.numpy import load_file, save_file

    tiny_models.build(model, folder, changes=changes)
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    weights = load_file(folder / "model.safetensors")
    drawn = {name: _weight(name, weight.shape) for name, weight in weights.items()}
    save_file(drawn, folder / "model.safetensors", metadata={"format": "pt"})


def _weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    values = _draw(name, shape)
    if name.endswith("bias"):
        values = values * 0.2
    elif len(shape) == 1:
        values = values * 0.2 + 1
    elif any(part in name for part in ("embed", "wte", "wpe")):
        values = values * 0.5
    else:
        values = values * 1.5 * shape[-1] ** -0.5
    return values.astype(np.float32)


def _write_importance(path: Path) -> None:
    """An importance matrix for "mini", in the older form: means times 3 calls."""
    columns = {"ffn_down": 768} | dict.fromkeys(
        ("attn_k", "attn_output", "attn_q", "attn_v", "ffn_gate", "ffn_up"), 256
    )
    names = {f"blk.{i}.{key}.weight": size for i in range(4) for key, size in columns.items()}
    names["token_embd.weight"] = 256
    parts = [struct.pack("<i", len(names))]
    for name, size in names.items():
        means = _draw(name, (size,)) ** 2 + 0.01
        label = name.encode()
        parts += [struct.pack("<i", len(label)), label, struct.pack("<ii", 3, size)]
        parts.append((means * 3).astype(np.float32).tobytes())
    parts.append(struct.pack("<ii", 3, 5) + b"drawn")
    path.write_bytes(b"".join(parts))
