"""Mixtures of experts after DeepSeek's: dense first layers, shared experts, a router's bias.

The first layers have one MLP, the others experts, of which a router sends each token to a few,
beside a wide one that every token visits. The router scores by softmax or sigmoid; a bias may be
added to the scores for the choice alone (arXiv:2408.15664), the choice may be limited to some
groups of experts, and the chosen scores may be normalised and scaled. llama.cpp's build_moe_ffn
does all of it by key-values.

Families name the settings differently; a `MixtureNames` says how.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from quantcli.archs.config import Config, class_name, count, flag, integer, number
from quantcli.archs.decoder import MLP, expert_keys, experts, layer
from quantcli.archs.fold import DECODER, GATED_SHARED, WRITERS, Folds
from quantcli.archs.header import Header
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, boolean, f32, u32

SOFTMAX, SIGMOID = 1, 2
"""llama_expert_gating_func_type."""

_KINDS = ("dense", "sparse")


@dataclass(frozen=True, slots=True)
class MixtureNames:
    """config.json's keys of the settings; DeepSeek's where a family names no others."""

    experts: str = "n_routed_experts"
    used: str = "num_experts_per_tok"
    shared: str = "n_shared_experts"
    width: str = "moe_intermediate_size"
    dense: str = "first_k_dense_replace"
    scale: str = "routed_scaling_factor"


DEEPSEEK = MixtureNames()


def mixture_dims(config: Config, names: MixtureNames = DEEPSEEK) -> dict[str, int]:
    """Sizes: "experts", "expert_ff", "shared_ff", and "dense", how many first layers are dense."""
    width = integer(config, names.width)
    return {
        "experts": integer(config, names.experts),
        "expert_ff": width,
        "shared": count(config, names.shared, default=0),
        "shared_ff": width * count(config, names.shared, default=0),
        "dense": dense_layers(config, names),
    }


FOLDS = Folds(
    rules=(*DECODER.rules[:-1], GATED_SHARED, DECODER.rules[-1]),
    writers=(*WRITERS, "blk.{i}.ffn_down_shexp"),
    basis="",
)
"""With grouped-query attention."""


def dense_layers(config: Config, names: MixtureNames = DEEPSEEK) -> int:
    """How many layers from the first on have no experts, all after them having some."""
    layers = integer(config, "num_hidden_layers")
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return min(count(config, names.dense, default=0), layers)
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(_KINDS):
        raise ArchitectureError(
            f"mlp_layer_types of {class_name(config)} in config.json is {kinds!r}, expected one "
            f"of {' and '.join(_KINDS)} for each of {layers} layers"
        )
    dense = kinds.count("dense")
    if "dense" in kinds[dense:]:
        raise ArchitectureError(
            f"mlp_layer_types of {class_name(config)} in config.json has a dense layer after one "
            "with experts, but llama.cpp takes only the first layers to be dense"
        )
    return dense


def mixture_rules(
    config: Config, names: MixtureNames = DEEPSEEK, *, gate: str = "gate",
    bias: str = "gate.e_score_correction_bias", shared: str = "shared_experts",
) -> tuple[Rule, ...]:  # fmt: skip
    """The dense layers' MLP, and `sparse_rules` for the others."""
    dense, layers = dense_layers(config, names), integer(config, "num_hidden_layers")
    sparse = sparse_rules(config, names, gate=gate, bias=bias, shared=shared)
    return (*placed(MLP, range(dense)), *placed(sparse, range(dense, layers)))


def sparse_rules(
    config: Config, names: MixtureNames = DEEPSEEK, *, gate: str = "gate",
    bias: str = "gate.e_score_correction_bias", shared: str = "shared_experts",
) -> tuple[Rule, ...]:  # fmt: skip
    """Router, experts and shared experts of a layer.

    ``gate`` is the router, ``bias`` its bias; empty where it has none.
    """
    router, *matrices = experts("mlp", "gate_proj", "up_proj", "down_proj")
    router = replace(router, source=f"model.layers.{{i}}.mlp.{gate}.weight")
    scores = (layer("exp_probs_b.bias", f"mlp.{bias}", "experts"),) if bias else ()
    beside = shared_rules(f"mlp.{shared}") if config.get(names.shared) else ()
    return (router, *matrices, *scores, *beside)


def shared_rules(inside: str) -> tuple[Rule, ...]:
    """The experts that every token visits, side by side in three matrices."""
    return (
        layer("ffn_gate_shexp.weight", f"{inside}.gate_proj.weight", "shared_ff", "hidden"),
        layer("ffn_up_shexp.weight", f"{inside}.up_proj.weight", "shared_ff", "hidden"),
        layer("ffn_down_shexp.weight", f"{inside}.down_proj.weight", "hidden", "shared_ff"),
    )


def placed(rules: tuple[Rule, ...], layers: Collection[int]) -> tuple[Rule, ...]:
    """The rules, for some layers only."""
    return tuple(replace(rule, layers=layers) for rule in rules)


def mixture_keys(
    config: Config, dims: Dims, gating: int, names: MixtureNames = DEEPSEEK
) -> dict[str, MetaValue]:
    """The key-values of experts and router, which scores by ``gating``."""
    used = {**config, "num_experts_per_tok": config.get(names.used)}
    return {
        **expert_keys(used, dims),
        **_group_keys(used, dims),
        "expert_feed_forward_length": u32(dims["expert_ff"]),
        "expert_shared_count": u32(dims["shared"]),
        "expert_weights_scale": f32(number(config, names.scale, default=1.0)),
        "expert_weights_norm": boolean(flag(config, "norm_topk_prob")),
        "expert_gating_func": u32(gating),
        "leading_dense_block_count": u32(dims["dense"]),
    }


def mixture_config(header: Header, names: MixtureNames = DEEPSEEK) -> dict[str, Any]:
    """`mixture_keys` read backwards; one group where the file names none."""
    return {
        **header.named(
            **{
                names.experts: "expert_count",
                names.used: "expert_used_count",
                names.width: "expert_feed_forward_length",
                names.shared: "expert_shared_count",
                names.scale: "expert_weights_scale",
                names.dense: "leading_dense_block_count",
            }
        ),
        "n_group": header.keys.get("expert_group_count", 1),
        "topk_group": header.keys.get("expert_group_used_count", 1),
        "norm_topk_prob": header.keys.get("expert_weights_norm", False),
    }


def _group_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    """The groups to which the choice is limited; none where it may be in all of them."""
    groups = count(config, "n_group", default=1)
    chosen = count(config, "topk_group", default=groups)
    if groups < 2 or chosen >= groups:
        return {}
    each = dims["experts"] // groups
    used = integer(config, "num_experts_per_tok")
    if dims["experts"] % groups or each < 2 or not 0 < used <= chosen * each:
        raise ArchitectureError(
            f"config.json of {class_name(config)} chooses {used} experts from {chosen} of "
            f"{groups} groups of {dims['experts']}, expected equal groups with at least 2 each "
            "and enough experts in those chosen"
        )
    return {"expert_group_count": u32(groups), "expert_group_used_count": u32(chosen)}
