"""Mellum 2: Qwen3-MoE with a sliding window in some layers; llama.cpp's "mellum".

All layers turn by one base; those without a window may be stretched by YaRN. A block for
multi-token prediction is left out (a note says so), as llama.cpp has none for this architecture.

Refused: layers without experts, gates that are not normalised, tied embeddings, and a base of its
own for the layers with a window, of which llama.cpp has none.
Sources: JetBrains' model card, transformers' modeling_mellum.py, llama.cpp's src/models/mellum.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.config import Config, class_name, listing, positive
from quantcli.archs.decoder import decoder_config, decoder_keys, expert_keys
from quantcli.archs.header import Header
from quantcli.archs.qwen3_moe import QWEN3_MOE
from quantcli.archs.rope import read_layer_rope, rope_keys
from quantcli.archs.rules import Dims
from quantcli.archs.windows import layer_kinds, window_config, window_keys
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

_FULL, _WINDOWED = "full_attention", "sliding_attention"


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    kinds = layer_kinds(config, dims["layers"], [_FULL] * dims["layers"])
    full = read_layer_rope(config, _FULL, "rope_theta", ("default", "yarn"))
    local = read_layer_rope(config, _WINDOWED, "rope_theta", ("default",))
    ropes = {_FULL: full, _WINDOWED: local}
    bases = {kind: positive(ropes[kind], "rope_theta") for kind in sorted(set(kinds))}
    if len(set(bases.values())) > 1:
        raise ArchitectureError(
            f"config.json of {class_name(config)} sets rope_theta to {bases[_FULL]:g} and, where "
            f"there is a sliding window, {bases[_WINDOWED]:g}, but llama.cpp has one for all layers"
        )
    return {
        **decoder_keys(config, dims),
        **rope_keys(full if _FULL in kinds else local),
        **window_keys(config, kinds),
        **expert_keys(config, dims),
        "expert_feed_forward_length": u32(dims["expert_ff"]),
    }


def _check(config: Config, dims: Dims) -> None:
    kinds = listing(config, "mlp_layer_types", str) or []
    if "dense" in kinds:
        raise ArchitectureError(
            f"mlp_layer_types of {class_name(config)} in config.json has dense layers, but "
            "llama.cpp expects experts in each"
        )


def _notes(config: Config) -> tuple[str, ...]:
    if not (config.get("num_nextn_predict_layers") or config.get("num_mtp_layers")):
        return ()
    return (
        f"the block for multi-token prediction of {class_name(config)} is left out, since "
        "llama.cpp does not run it",
    )


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "MellumForCausalLM", "mellum")
    rope = config["rope_parameters"]
    return {
        **config,
        **window_config(header),
        **header.named(
            num_experts="expert_count",
            num_experts_per_tok="expert_used_count",
            moe_intermediate_size="expert_feed_forward_length",
        ),
        "rope_parameters": {
            _FULL: rope,
            _WINDOWED: {"rope_type": "default", "rope_theta": rope["rope_theta"]},
        },
    }


MELLUM = replace(
    QWEN3_MOE,
    name="mellum",
    to_keys=_keys,
    to_config=_config,
    check=_check,
    read_notes=_notes,
    defaults={
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "head_dim": 128,
        "norm_topk_prob": True,
        "rope_theta": 500000.0,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "norm_topk_prob": (True,),
        "tie_word_embeddings": (False,),
        "use_sliding_window": (True,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq", r"(model\.)?mtp\..*"),
)
