"""Granite 4: Mamba-2 with attention in some layers, dense or with experts; "granitehybrid".

Attention has no positions unless config.json asks for them. Where every layer is attention
llama.cpp calls the model a "granite", or a "granitemoe" if there are experts, and so does this.
Beside experts, or in their place, an MLP is visited by every token.

Refused: mixers that are not twice as wide as the stream or lack their convolution's bias, which
llama.cpp takes for granted, biases elsewhere, and limits of time steps, which it has not.
Sources: IBM's model cards, transformers' modeling_granitemoehybrid.py, llama.cpp's
src/models/granite-hybrid.cpp.
"""

from __future__ import annotations

from dataclasses import replace

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.decoder import ATTENTION, attention_dims
from quantcli.archs.fold import HYBRID
from quantcli.archs.granite import DEFAULTS, FIXED, IGNORED, keys
from quantcli.archs.granite_config import ATTENTION as FULL
from quantcli.archs.granite_config import MAMBA, ROTATES, rebuilt
from quantcli.archs.granite_moe import (
    EXPERTS,
    RENAMES,
    around,
    mixture_dims,
    mixture_keys,
    shared,
)
from quantcli.archs.mamba_mixer import STEP_LIMITS, mamba2, mamba2_dims, mamba2_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, boolean

_KINDS = {"attention": FULL, "mamba": MAMBA, FULL: FULL, MAMBA: MAMBA}
"""Both generations' names of what a layer has."""


def _kinds(config: Config) -> list[str]:
    """What each layer has, attention or a mixer."""
    layers = integer(config, "num_hidden_layers")
    found = config.get("layer_types") or config.get("layers_block_type") or [MAMBA] * layers
    if not isinstance(found, list) or len(found) != layers or not set(found) <= set(_KINDS):
        raise ArchitectureError(
            f"layer_types of {class_name(config)} in config.json is {found!r}, expected one of "
            f"{' and '.join(_KINDS)} for each of {layers} layers"
        )
    return [_KINDS[kind] for kind in found]


def _layers(config: Config, kind: str) -> tuple[int, ...]:
    return tuple(index for index, found in enumerate(_kinds(config)) if found == kind)


def _rotates(config: Config) -> bool:
    """Whether attention knows positions."""
    kind = config.get("position_embedding_type")
    if kind not in (None, "rope", "nope"):
        raise ArchitectureError(
            f"config.json sets position_embedding_type to {kind!r}, but llama.cpp computes "
            f"{class_name(config)} with 'rope' or without positions only"
        )
    return kind == "rope"


def _dims(config: Config) -> dict[str, int]:
    ff = integer(config, "shared_intermediate_size")
    if not config.get("num_local_experts"):
        config = {**config, "intermediate_size": ff}
    dims = mixture_dims(config, attention_dims(config))
    if not _layers(config, MAMBA):
        return dims
    mixer = mamba2_dims(config, dims["hidden"], 2 * dims["hidden"])
    size = config.get("mamba_d_head")
    if size not in (None, "auto", mixer["ssm_inner"] // mixer["ssm_heads"]):
        raise ArchitectureError(
            f"config.json of {class_name(config)} has {mixer['ssm_heads']} mixer heads of "
            f"{size!r}, which do not make twice hidden_size {dims['hidden']}"
        )
    return {**dims, **mixer}


def _rules(config: Config) -> tuple[Rule, ...]:
    attention = {rule.name for rule in ATTENTION}
    mixed = bool(config.get("num_local_experts"))
    return (
        *(
            replace(rule, layers=_layers(config, FULL)) if rule.name in attention else rule
            for rule in around(config)
        ),
        *mamba2("model.layers.{i}.mamba", _layers(config, MAMBA)),
        *(EXPERTS if mixed else ()),
        *shared("_shexp" if mixed else ""),
    )


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    found = {
        **keys(config, dims),
        **mixture_keys(config, dims),
        ROTATES: boolean(_rotates(config)),
    }
    if "ssm_heads" in dims:
        found |= mamba2_keys(dims)
        heads = [dims["kv_heads"] if kind == FULL else 0 for kind in _kinds(config)]
        found["attention.head_count_kv"] = array("i32", heads)
    return found


def _has_no_mixer(config: Config) -> bool:
    return not _layers(config, MAMBA)


def _is_dense(config: Config) -> bool:
    return _has_no_mixer(config) and not config.get("num_local_experts")


def _check_positions(config: Config, dims: Dims) -> None:
    if not _rotates(config):
        raise ArchitectureError(
            f"config.json of {class_name(config)} has experts and attention without positions in "
            "every layer, but llama.cpp's granitemoe rotates them always (position_embedding_type)"
        )


_HYBRID = Architecture(
    name="granitehybrid",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=rebuilt,
    defaults={
        **DEFAULTS,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 1024,
        "mamba_n_heads": 128,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
    },
    fixed={
        **FIXED,
        "mamba_expand": (2,),
        "mamba_conv_bias": (True,),
        "mamba_proj_bias": (False,),
        "time_step_limit": STEP_LIMITS,
    },
    renames=RENAMES,
    ignored=IGNORED,
    folds=HYBRID,
)
GRANITE_HYBRID = replace(
    _HYBRID,
    others=(
        (_is_dense, replace(_HYBRID, name="granite")),
        (_has_no_mixer, replace(_HYBRID, name="granitemoe", check=_check_positions)),
    ),
)
