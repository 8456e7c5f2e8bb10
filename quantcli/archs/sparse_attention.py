"""DeepSeek V3.2 and GLM-5: latent attention over the tokens that an indexer picks.

A small attention beside each layer's own, the "lightning indexer", scores earlier tokens; the layer
attends to the ``index_topk`` best of them, so up to that many tokens nothing changes. DeepSeek's
("deepseek32") rotates by halves there, GLM's ("glm-dsa") by neighbours as everywhere else, and in
GLM's later models most layers take the choice of a layer before them (``indexer_types``).

Refused: another mscale of YaRN than 1, and any YaRN for GLM, which llama.cpp does not compute here.
Sources: DeepSeek-V3.2's report, transformers' modeling_deepseek_v32.py and
modeling_glm_moe_dsa.py, llama.cpp's src/models/deepseek32.cpp and glm-dsa.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import no_check
from quantcli.archs.config import Config, class_name, count, integer, number
from quantcli.archs.decoder import EMBEDDING, NORMS, OUTPUT_NORM, layer, output
from quantcli.archs.deepseek2 import DEEPSEEK_V3, GLM4_MOE_LITE
from quantcli.archs.fold import FoldRule, Folds
from quantcli.archs.header import Header
from quantcli.archs.mixture import (
    SIGMOID,
    mixture_config,
    mixture_dims,
    mixture_keys,
    mixture_rules,
    placed,
    sparse_rules,
)
from quantcli.archs.mla import FOLDS, mla_config, mla_dims, mla_keys, mla_notes, mla_rules
from quantcli.archs.mtp import Mtp, behind, nextn_rules
from quantcli.archs.rope import Rope, read_rope
from quantcli.archs.rules import Dims, Rule
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, u32

_HEADS, _SIZE, _TOP = "index_n_heads", "index_head_dim", "index_topk"
_LEAST = 64
"""The smallest Hadamard matrix by which llama.cpp turns an indexer's queries and keys."""
_TYPES = "attention.indexer.types"
_KINDS = ("shared", "full")
_INDEXER = (
    layer("indexer.attn_q_b.weight", "self_attn.indexer.wq_b.weight", "index_q", "q_rank"),
    layer("indexer.attn_k.weight", "self_attn.indexer.wk.weight", "index", "hidden"),
    layer("indexer.k_norm.weight", "self_attn.indexer.k_norm.weight", "index"),
    layer("indexer.k_norm.bias", "self_attn.indexer.k_norm.bias", "index"),
    layer("indexer.proj.weight", "self_attn.indexer.weights_proj.weight", "indexers", "hidden"),
)
_READS = {
    "blk.{i}.attn_norm": ("blk.{i}.indexer.attn_k", "blk.{i}.indexer.proj"),
    "blk.{i}.attn_q_a_norm": ("blk.{i}.indexer.attn_q_b",),
}
"""What an indexer reads of the norms' outputs."""


def _widened(rule: FoldRule) -> FoldRule:
    return replace(rule, consumers=(*rule.consumers, *_READS.get(rule.producers[0], ())))


_FOLDS = Folds(tuple(map(_widened, FOLDS.rules)), FOLDS.writers, FOLDS.basis, FOLDS.apart)


def _dims(config: Config) -> dict[str, int]:
    heads, size = integer(config, _HEADS), integer(config, _SIZE)
    dims = mla_dims(config)
    if "q_rank" not in dims or size < max(_LEAST, dims["rope"]) or size & (size - 1):
        raise ArchitectureError(
            f"config.json of {class_name(config)} has q_lora_rank {config.get('q_lora_rank')!r} "
            f"and {_SIZE} {size}, but llama.cpp needs a rank, and a power of two that is neither "
            f"below {_LEAST} nor below qk_rope_head_dim"
        )
    return {
        **dims, **mixture_dims(config), "index": size, "indexers": heads, "index_q": heads * size,
    }  # fmt: skip


def _kinds(config: Config) -> list[bool]:
    """Which layers have an indexer of their own."""
    layers = integer(config, "num_hidden_layers")
    kinds = config.get("indexer_types", config.get("index_topk_pattern"))
    if isinstance(kinds, str):
        kinds = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in kinds]
    if kinds is None:
        every = max(count(config, "index_topk_freq", default=1), 1)
        first = count(config, "index_skip_topk_offset", default=2)
        kinds = [_KINDS[max(i - first + 1, 0) % every == 0] for i in range(layers)]
    ill = not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(_KINDS)
    if ill or kinds[0] != "full":
        raise ArchitectureError(
            f"indexer_types of {class_name(config)} in config.json is {kinds!r}, expected one of "
            f"{' and '.join(_KINDS)} for each of {layers} layers, the first of them full"
        )
    return [kind == "full" for kind in kinds]


def _rope(config: Config) -> Rope:
    glm = config["architectures"][0].startswith("Glm")
    rope = read_rope(config, ("default",) if glm else ("default", "yarn"))
    mscales = [number(rope, key, default=1.0) for key in ("mscale", "mscale_all_dim")]
    if rope["rope_type"] == "yarn" and mscales != [1, 1]:
        raise ArchitectureError(
            f"config.json of {class_name(config)} sets mscale and mscale_all_dim of yarn to "
            f"{mscales[0]:g} and {mscales[1]:g}, but llama.cpp computes it with 1 for either"
        )
    return rope


def _rules(config: Config) -> tuple[Rule, ...]:
    own = [index for index, full in enumerate(_kinds(config)) if full]
    inside = (*mla_rules(config), *placed(_INDEXER, own), *mixture_rules(config))
    return (EMBEDDING, OUTPUT_NORM, output(config), *NORMS, *inside)


def _block_rules(config: Config, blocks: range) -> tuple[Rule, ...]:
    optional = (replace(rule, optional=True) for rule in _INDEXER)
    inside = (*mla_rules(config), *optional, *sparse_rules(config), *nextn_rules(config))
    return behind(blocks, *NORMS, *inside)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    kinds = _kinds(config)
    return {
        **mla_keys(config, dims, _rope(config)),
        **mixture_keys(config, dims, SIGMOID),
        "attention.indexer.head_count": u32(dims["indexers"]),
        "attention.indexer.key_length": u32(dims["index"]),
        "attention.indexer.top_k": u32(integer(config, _TOP)),
        **({} if all(kinds) else {_TYPES: array("bool", kinds)}),
    }


def _config(header: Header, model: str, kind: str) -> dict[str, Any]:
    found = mixture_config(header)
    layers = int(header.keys.get("block_count", 1))
    dense = found.get("first_k_dense_replace", 0)
    return {
        **mla_config(header, model, kind),
        **found,
        **header.named(
            **{
                _HEADS: "attention.indexer.head_count",
                _SIZE: "attention.indexer.key_length",
                _TOP: "attention.indexer.top_k",
            }
        ),
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
    }


def _deepseek_config(header: Header) -> dict[str, Any]:
    return _config(header, "DeepseekV32ForCausalLM", "deepseek_v32")


def _glm_config(header: Header) -> dict[str, Any]:
    kinds = header.keys.get(_TYPES, [True] * int(header.keys.get("block_count", 1)))
    return {
        **_config(header, "GlmMoeDsaForCausalLM", "glm_moe_dsa"),
        "indexer_types": [_KINDS[bool(kind)] for kind in kinds],
    }


def _notes(config: Config) -> tuple[str, ...]:
    return mla_notes(config, _rope(config))


DEEPSEEK_V32 = replace(
    DEEPSEEK_V3,
    name="deepseek32",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_deepseek_config,
    check=no_check,
    read_notes=_notes,
    defaults={**DEEPSEEK_V3.defaults, _HEADS: 64, _SIZE: 128, _TOP: 2048},
    fixed={**DEEPSEEK_V3.fixed, "indexer_types": (None,), "index_topk_freq": (1,)},
    folds=_FOLDS,
    mtp=Mtp("num_nextn_predict_layers", "model.layers.{i}.eh_proj.weight", _block_rules, most=1),
)

GLM_MOE_DSA = replace(
    DEEPSEEK_V32,
    name="glm-dsa",
    to_config=_glm_config,
    defaults={
        **GLM4_MOE_LITE.defaults,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 2048,
        _HEADS: 32,
        _SIZE: 128,
        _TOP: 2048,
    },
    fixed=DEEPSEEK_V3.fixed,
)
