"""Models whose settings or tensors were changed, and what must come of them.

A trial is drawn from a number. Half of them change settings before transformers makes the model,
so weights and settings agree and the file must compute what transformers computes; the others
change the files of a finished checkpoint. In both, a file that is written either gives
transformers' logits or a remark says what llama.cpp computes otherwise; everything else is refused
in one sentence.
"""

from __future__ import annotations

import copy
import json
import random
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from support.llama_process import LlamaProcess
from support.tiny.base import LINEAR_ROPE, LLAMA3_ROPE, YARN_ROPE
from support.tiny_models import MODELS, build

import quantcli
from quantcli.errors import QuantcliError

BOUND = 5e-3
"""Of the logits' deviation; ggml's table for GELU alone takes up to 2e-3."""

TOKENS = np.random.default_rng(0).integers(2, 4000, 48).tolist()

_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "swiglu", "")
_NONSENSE = (0, -1, 2**40, 1.5, "64", None, True, [], {}, [1, 2], "", float("1e400"), "é\n")
_ADDED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (True, False),
    "mlp_bias": (True, False),
    "use_bias": (True, False),
    "qkv_bias": (True, False),
    "tie_word_embeddings": (True, False),
    "head_dim": (8, 16, 48),
    "hidden_act": _ACTIVATIONS,
    "sliding_window": (16, None, 0),
    "use_sliding_window": (True, False),
    "partial_rotary_factor": (0.5, 0.25, 1.0),
    "norm_topk_prob": (True, False),
    "num_key_value_heads": (1, 2, 4),
    "num_attention_heads": (2, 8),
    "num_hidden_layers": (1, 3),
    "num_experts_per_tok": (1, 3),
    "intermediate_size": (32, 100, 160),
    "hidden_size": (32, 96),
    "max_position_embeddings": (64, 2048),
    "rms_norm_eps": (0.5, 1e-6),
    "layer_norm_eps": (0.5, 1e-6),
    "final_logit_softcapping": (5.0, None),
    "attn_logit_softcapping": (5.0, None),
    "logits_scaling": (0.5,),
    "logit_scale": (0.5,),
    "attention_multiplier": (0.3,),
    "layer_types": (["full_attention"] * 2, ["sliding_attention", "full_attention"]),
    "rope_parameters": (
        LINEAR_ROPE, LLAMA3_ROPE, YARN_ROPE,
        {"rope_type": "default", "rope_theta": 50.0},
        {"rope_type": "dynamic", "rope_theta": 3000.0, "factor": 2.0},
        {"rope_type": "proportional", "rope_theta": 3000.0},
    ),
    "first_k_dense_replace": (0, 1, 2),
    "n_group": (2,),
    "use_qk_norm": (True, False),
    "qk_layernorm": (True, False),
    "parallel_residual": (True, False),
    "scale_attn_by_inverse_layer_idx": (True,),
    "clip_qkv": (0.5, None),
    "add_bias_linear": (True,),
    "moe_intermediate_size": (16, 48),
}  # fmt: skip
_CLASSES = (
    "LlamaForCausalLM", "Qwen3ForCausalLM", "GPTJForCausalLM", "NoSuchForCausalLM", "",
    "LlamaModel", "LlamaForSequenceClassification", "Mistral3ForConditionalGeneration",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A model of `MODELS` with one change: ``what`` was done, and the ``words`` that name it."""

    seed: int
    name: str
    what: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: "equal", "remarked", "refused", "not made" or a fault."""

    trial: Trial
    kind: str
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether it must not be."""
        return self.kind == "fault"


def run_trial(seed: int, folder: Path, llama: LlamaProcess) -> Outcome:
    """The trial with this number, in a ``folder`` of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    name = chance.choice(sorted(MODELS))
    change = _settings if chance.random() < 0.5 else _files
    model = folder / "model"
    try:
        trial = change(chance, seed, name, model)
    except Exception as error:  # transformers has no model of these settings
        return Outcome(Trial(seed, name, "settings", ()), "not made", repr(error))
    return judge(trial, model, folder / "model.gguf", llama)


def judge(trial: Trial, model: Path, path: Path, llama: LlamaProcess) -> Outcome:
    """What comes of quantizing the changed ``model`` into ``path``."""
    try:
        done = quantcli.quantize(model, path, type="F32", threads=1)
    except QuantcliError as error:
        said = f"{error.message} {error.hint or ''}"
        named = any(word and word in said for word in (*trial.words, "config.json", "tensor "))
        whole = named and "internal error" not in said and "\n" not in said and not path.exists()
        return Outcome(trial, "refused" if whole else "fault", said)
    except Exception:
        return Outcome(trial, "fault", traceback.format_exc())
    try:
        found = llama.logits(path, TOKENS)
    except AssertionError as error:
        return Outcome(trial, "fault", f"{error} (written without a word)")
    try:
        expected = _transformers(model)
    except Exception as error:
        if len(trial.words) == 1:
            return Outcome(trial, "not made", f"transformers does not run it: {error!r}")
        # A setting or tensor that the text model does not use, so the change must not matter.
        expected = _unchanged(trial.name)
        if not np.abs(found - expected).max() / expected.std() < BOUND:
            return Outcome(trial, "fault", f"written, but transformers says {error!r}")
    wrong = float(np.abs(found - expected).max() / expected.std())
    if wrong < BOUND:
        return Outcome(trial, "equal")
    remarks = [note.message for note in done.notes if "llama.cpp" in note.message]
    kind = "remarked" if remarks else "fault"
    return Outcome(trial, kind, f"logits differ by {wrong:.2g}; {' '.join(remarks)}")


@cache
def _unchanged(name: str) -> Any:
    with TemporaryDirectory() as folder:
        return _transformers(build(name, Path(folder) / "model"))


def _transformers(model: Path) -> Any:
    import torch
    import transformers

    config = json.loads((model / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    if "text_config" in config and not hasattr(kind.config_class(), "text_config"):
        # It would fill its own sizes in, those of a model of 7 billion weights.
        raise ValueError(f"{kind.__name__} knows no text_config")
    loaded, report = kind.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(f"it lacks {sorted(report['missing_keys'])[:3]}")
    with torch.no_grad():
        return loaded(torch.tensor([TOKENS])).logits[0].float().numpy()


def _settings(chance: random.Random, seed: int, name: str, model: Path) -> Trial:
    """Change settings, then let transformers make the model."""
    settings = copy.deepcopy(MODELS[name].config)
    inner = settings.get("text_config", settings)
    known = [key for key in _ADDED if key in inner] or list(_ADDED)
    key = chance.choice(known if chance.random() < 0.6 else list(_ADDED))
    inner[key] = copy.deepcopy(chance.choice(_ADDED[key]))
    build(name, model, changes=settings)
    return Trial(seed, name, f"{key} = {inner[key]!r}", (key,))


def _files(chance: random.Random, seed: int, name: str, model: Path) -> Trial:
    """Change the files of a finished checkpoint."""
    build(name, model)
    changes: tuple[Callable[..., tuple[str, str]], ...] = (
        _drop_key, _set_key, _add_key, _rename_class, _drop_tensor, _add_tensor, _reshape_tensor,
    )  # fmt: skip
    what, word = chance.choice(changes)(chance, model)
    return Trial(seed, name, what, (word, re.sub(r"\d+", "{e}", word)))


def _edit_config(model: Path, edit: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    edit(config, config.get("text_config", config))
    path.write_text(json.dumps(config))


def _pick_key(chance: random.Random, model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    return chance.choice(sorted(config.get("text_config", config)))


def _drop_key(chance: random.Random, model: Path) -> tuple[str, str]:
    key = _pick_key(chance, model)
    _edit_config(model, lambda _, inner: inner.pop(key))
    return f"without {key}", key


def _set_key(chance: random.Random, model: Path) -> tuple[str, str]:
    key, value = _pick_key(chance, model), chance.choice(_NONSENSE)

    def edit(_: dict[str, Any], inner: dict[str, Any]) -> None:
        # transformers takes no whole number for a float, which JSON's writers make of 0.0.
        inner[key] = float(value) if isinstance(inner[key], float) and value == 0 else value

    _edit_config(model, edit)
    return f"{key} = {value!r}", key


def _add_key(chance: random.Random, model: Path) -> tuple[str, str]:
    key = chance.choice(sorted(_ADDED))
    value = chance.choice((*_ADDED[key], *_NONSENSE))
    _edit_config(model, lambda _, inner: inner.update({key: value}))
    return f"{key} = {value!r} in a finished config.json", key


def _rename_class(chance: random.Random, model: Path) -> tuple[str, str]:
    name = chance.choice(_CLASSES)
    _edit_config(model, lambda config, _: config.update({"architectures": [name]}))
    return f"class {name!r}", name


def _edit_tensors(model: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.numpy import load_file, save_file

    path = model / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def _pick_tensor(chance: random.Random, model: Path) -> str:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "numpy") as file:
        return chance.choice(sorted(file.keys()))


def _drop_tensor(chance: random.Random, model: Path) -> tuple[str, str]:
    name = _pick_tensor(chance, model)
    _edit_tensors(model, lambda tensors: tensors.pop(name))
    return f"without tensor {name}", name


def _add_tensor(chance: random.Random, model: Path) -> tuple[str, str]:
    old = _pick_tensor(chance, model)
    name = chance.choice((
        re.sub(r"\.\d+\.", ".7.", old, count=1), old.replace(".weight", ".bias"), f"{old}.extra",
        old.replace("weight", "lora_A.weight"),
    ))  # fmt: skip

    def add(tensors: dict[str, Any]) -> None:
        tensors.setdefault(name, tensors[old][:1].copy())

    _edit_tensors(model, add)
    return f"with tensor {name}", name


def _reshape_tensor(chance: random.Random, model: Path) -> tuple[str, str]:
    name = _pick_tensor(chance, model)

    def cut(tensors: dict[str, Any]) -> None:
        kept = tensors[name]
        tensors[name] = np.ascontiguousarray(kept[: max(1, len(kept) // 2)])

    _edit_tensors(model, cut)
    return f"tensor {name} cut", name
