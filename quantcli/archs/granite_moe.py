"""Granite 3 with experts, and one that every token visits in some; llama.cpp's "granitemoe".

Gate and up of all experts are stored in one tensor, gate above up in each; so are those of the
expert that every token visits. The router weighs the chosen experts by a softmax over them.

Sources: IBM's model cards, transformers' modeling_granitemoe.py and modeling_granitemoeshared.py,
llama.cpp's src/models/granite-moe.cpp.
"""

from __future__ import annotations

from dataclasses import replace

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, integer
from quantcli.archs.decoder import MLP, attention_dims, expert_keys, layer
from quantcli.archs.fold import HYBRID
from quantcli.archs.granite import DEFAULTS, FIXED, IGNORED, keys
from quantcli.archs.granite_config import SHARED, rebuilt
from quantcli.archs.llama import rules
from quantcli.archs.rules import Dims, Part, Rule
from quantcli.types import MetaValue, u32

RENAMES = (
    (r"\.block_sparse_moe\.experts\.gate_up_proj$", ".block_sparse_moe.input_linear.weight"),
    (r"\.block_sparse_moe\.experts\.down_proj$", ".block_sparse_moe.output_linear.weight"),
    (r"\.block_sparse_moe\.router\.weight$", ".block_sparse_moe.router.layer.weight"),
)
"""transformers 5 calls them so in memory, and in files when asked not to restore the old names."""

_EXPERTS = "block_sparse_moe.input_linear.weight"
_SHARED = "shared_mlp.input_linear.weight"


def _half(name: str, source: str, index: int, *shape: str) -> Rule:
    """One of two matrices that lie above one another in ``source``, or in each of a stack."""
    stack, (rows, columns) = shape[:-2], shape[-2:]
    part = Part((*stack, 2, rows, columns), cut=((len(stack), index, index + 1),))
    rule = layer(f"{name}.weight", source, *shape)
    return replace(rule, stored=(*stack, f"2{rows}", columns), parts=(part,))


EXPERTS = (
    layer("ffn_gate_inp.weight", "block_sparse_moe.router.layer.weight", "experts", "hidden"),
    _half("ffn_gate_exps", _EXPERTS, 0, "experts", "ff", "hidden"),
    _half("ffn_up_exps", _EXPERTS, 1, "experts", "ff", "hidden"),
    layer(
        "ffn_down_exps.weight", "block_sparse_moe.output_linear.weight", "experts", "hidden", "ff"
    ),
)


def shared(suffix: str) -> tuple[Rule, ...]:
    """The MLP that every token visits, its tensors' names with ``suffix``."""
    return (
        _half(f"ffn_gate{suffix}", _SHARED, 0, "shared_ff", "hidden"),
        _half(f"ffn_up{suffix}", _SHARED, 1, "shared_ff", "hidden"),
        layer(f"ffn_down{suffix}.weight", "shared_mlp.output_linear.weight", "hidden", "shared_ff"),
    )


def _shares(config: Config) -> bool:
    """Whether there is an MLP that every token visits."""
    return bool(config.get("shared_intermediate_size"))


def mixture_dims(config: Config, sizes: Dims) -> dict[str, int]:
    """``sizes`` with those of experts and of the MLP that every token visits."""
    found = {**sizes, "2ff": 2 * sizes["ff"]}
    if config.get("num_local_experts"):
        found["experts"] = integer(config, "num_local_experts")
    if _shares(config):
        found["shared_ff"] = integer(config, "shared_intermediate_size")
        found["2shared_ff"] = 2 * found["shared_ff"]
    return found


def mixture_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    """The key-values of experts and of the MLP that every token visits, as far as there are any."""
    found = expert_keys(config, dims) if "experts" in dims else {}
    if "shared_ff" in dims:
        found[SHARED] = u32(dims["shared_ff"])
    return found


def around(config: Config) -> tuple[Rule, ...]:
    """Llama's tensors without its MLP."""
    mlp = {rule.name for rule in MLP}
    return tuple(rule for rule in rules(config) if rule.name not in mlp)


def _dims(config: Config) -> dict[str, int]:
    experts = integer(config, "num_local_experts")
    return {**mixture_dims(config, attention_dims(config)), "experts": experts}


def _rules(config: Config) -> tuple[Rule, ...]:
    return (*around(config), *EXPERTS, *(shared("_shexp") if _shares(config) else ()))


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {**keys(config, dims), **mixture_keys(config, dims)}


GRANITE_MOE = Architecture(
    name="granitemoe",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=rebuilt,
    defaults={**DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2},
    fixed=FIXED,
    renames=RENAMES,
    ignored=IGNORED,
    folds=HYBRID,
)
