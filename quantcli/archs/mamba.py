"""Mamba, Falcon-Mamba and Mamba-2: state-space layers alone; llama.cpp's "mamba" and "mamba2".

There is no attention, and no length that a model was made for: GGUF's context is a million tokens,
as llama.cpp's converter has it. Falcon-Mamba norms the step, B and C without weights.

Refused: biases of projections, convolutions without one, limits of time steps, and a Mamba that is
not twice as wide inside, which llama.cpp has not.
Sources: arXiv:2312.00752, arXiv:2405.21060, arXiv:2410.05355, transformers' modeling_mamba.py,
modeling_falcon_mamba.py and modeling_mamba2.py, llama.cpp's src/models/mamba.cpp and mamba2.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer, number
from quantcli.archs.decoder import RMS_EPSILON, output
from quantcli.archs.fold import FoldRule, Folds
from quantcli.archs.header import Header
from quantcli.archs.mamba_mixer import (
    STEP_LIMITS,
    mamba1,
    mamba1_dims,
    mamba1_keys,
    mamba2,
    mamba2_dims,
    mamba2_keys,
)
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, boolean, f32, u32

_CONTEXT = 2**20
_NORMS_STEPS = "ssm.dt_b_c_rms"
_MAMBA = {
    "conv_kernel": "ssm.conv_kernel",
    "state_size": "ssm.state_size",
    "time_step_rank": "ssm.time_step_rank",
}
_MAMBA2 = {
    "conv_kernel": "ssm.conv_kernel",
    "state_size": "ssm.state_size",
    "num_heads": "ssm.time_step_rank",
    "n_groups": "ssm.group_count",
}
_MIXER = "backbone.layers.{i}.mixer"
_RENAMES = (
    (r"^model\.(?=(backbone|lm_head)\.)", ""),
    (r"^(?=(embeddings|layers|norm_f)\.)", "backbone."),
    (r"^backbone\.embedding\.", "backbone.embeddings."),
)
_FOLDS = Folds(
    rules=(
        FoldRule("norm", ("blk.{i}.attn_norm",), ("blk.{i}.ssm_in",)),
        FoldRule("norm", ("output_norm",), ("output",)),
    ),
    writers=("token_embd", "blk.{i}.ssm_out"),
    basis="",
    apart=tuple(f"blk.{{i}}.{name}" for name in ("ssm_conv1d", "ssm_x", "ssm_dt", "ssm_out")),
)


def _sizes(config: Config) -> dict[str, int]:
    hidden = integer(config, "hidden_size")
    return {
        "layers": integer(config, "num_hidden_layers"),
        "vocab": integer(config, "vocab_size"),
        "hidden": hidden,
    }


def _dims(config: Config) -> dict[str, int]:
    sizes = _sizes(config)
    hidden = sizes["hidden"]
    # Falcon-Mamba's config.json has an expand that its intermediate_size belies.
    inner = config.get("intermediate_size")
    inner = integer(config, "expand") * hidden if inner is None else inner
    if inner != 2 * hidden:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has mixers {inner!r} wide (intermediate_size, or "
            f"expand times hidden_size), but llama.cpp needs twice hidden_size {hidden}"
        )
    return {**sizes, **mamba1_dims(config, hidden, _MAMBA)}


def _dims2(config: Config) -> dict[str, int]:
    sizes = _sizes(config)
    inner = integer(config, "num_heads") * integer(config, "head_dim")
    return {**sizes, **mamba2_dims(config, sizes["hidden"], inner, _MAMBA2)}


def _around(config: Config) -> tuple[Rule, ...]:
    return (
        Rule("token_embd.weight", "backbone.embeddings.weight", ("vocab", "hidden")),
        Rule("output_norm.weight", "backbone.norm_f.weight", ("hidden",)),
        output(config),
        Rule("blk.{i}.attn_norm.weight", "backbone.layers.{i}.norm.weight", ("hidden",)),
    )


def _rules(config: Config) -> tuple[Rule, ...]:
    return (*_around(config), *mamba1(_MIXER))


def _rules2(config: Config) -> tuple[Rule, ...]:
    return (*_around(config), *mamba2(_MIXER))


def _base_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        "vocab_size": u32(dims["vocab"]),
        "context_length": u32(_CONTEXT),
        "embedding_length": u32(dims["hidden"]),
        "block_count": u32(dims["layers"]),
        "feed_forward_length": u32(0),
        "attention.head_count": u32(0),
        RMS_EPSILON: f32(number(config, "layer_norm_epsilon")),
    }


def _is_falcon(config: Config) -> bool:
    return class_name(config).startswith("FalconMamba")


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **_base_keys(config, dims),
        **mamba1_keys(dims),
        _NORMS_STEPS: boolean(_is_falcon(config)),
    }


def _keys2(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {**_base_keys(config, dims), **mamba2_keys(dims)}


def _notes(config: Config) -> tuple[str, ...]:
    ours, theirs = number(config, "layer_norm_epsilon"), number(config, "mixer_rms_eps")
    if not _is_falcon(config) or ours == theirs:
        return ()
    return (
        f"llama.cpp norms the mixers' steps, B and C with layer_norm_epsilon {ours:g}, the model "
        f"with mixer_rms_eps {theirs:g}; their values are far above either",
    )


def _base_config(header: Header, model: str, model_type: str) -> dict[str, Any]:
    return {
        "architectures": [model],
        "model_type": model_type,
        **header.named(
            hidden_size="embedding_length",
            num_hidden_layers="block_count",
            layer_norm_epsilon=RMS_EPSILON,
        ),
    }


def _config(header: Header) -> dict[str, Any]:
    falcon = bool(header.keys.get(_NORMS_STEPS))
    model = ("FalconMambaForCausalLM", "falcon_mamba") if falcon else ("MambaForCausalLM", "mamba")
    config = {**_base_config(header, *model), **header.named(**_MAMBA)}
    if falcon and "layer_norm_epsilon" in config:
        config["mixer_rms_eps"] = config["layer_norm_epsilon"]
    return config


def _config2(header: Header) -> dict[str, Any]:
    config = {**_base_config(header, "Mamba2ForCausalLM", "mamba2"), **header.named(**_MAMBA2)}
    inner, hidden = header.keys.get("ssm.inner_size"), config.get("hidden_size")
    if not inner or not hidden or not config.get("num_heads"):
        return config
    return {**config, "head_dim": inner // config["num_heads"], "expand": inner // hidden}


_DEFAULTS = {
    "layer_norm_epsilon": 1e-5,
    "mixer_rms_eps": 1e-6,
    "conv_kernel": 4,
}
_FIXED = {
    "hidden_act": ("silu", "swish"),
    "use_bias": (False,),
    "use_conv_bias": (True,),
}

MAMBA = Architecture(
    name="mamba",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    read_notes=_notes,
    defaults={
        **_DEFAULTS,
        "tie_word_embeddings": True,
        "expand": 2,
        "state_size": 16,
        "time_step_rank": "auto",
    },
    fixed=_FIXED,
    renames=_RENAMES,
    folds=_FOLDS,
    loads_packed=False,
)
MAMBA2 = replace(
    MAMBA,
    name="mamba2",
    read_dims=_dims2,
    read_rules=_rules2,
    to_keys=_keys2,
    to_config=_config2,
    defaults={
        **_DEFAULTS,
        "tie_word_embeddings": False,
        "state_size": 128,
        "num_heads": 128,
        "head_dim": 64,
        "n_groups": 8,
    },
    fixed={**_FIXED, "time_step_limit": STEP_LIMITS},
)
