"""Linear layers that servers run as one matrix, and those that must have one scheme for that.

vLLM and SGLang put q, k and v, gate and up, the two low ranks of latent attention and the inputs of
a delta net into one matrix each, which is quantized in one way or not at all; in NVFP4 it has one
scale of the whole matrix, too. The experts of a layer run in one kernel, all under one scheme.

Source: ``packed_modules_mapping`` of vLLM's models and the MoE methods of its quantizations.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

_PARTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
_DELTA = ("q_proj", "k_proj", "v_proj", "g_proj")
"""Of a delta net whose inputs are apart."""
_EXPERT = re.compile(r"(?P<layer>.*\bexperts)\.\d+\.")


def fused_with(module: str) -> list[str]:
    """The linear modules that servers run as one matrix with ``module``, itself among them."""
    block, _, leaf = module.rpartition(".")
    groups = (_DELTA, *_PARTS) if block.endswith("linear_attn") else _PARTS
    return next(
        ([f"{block}.{part}" for part in parts] for parts in groups if leaf in parts), [module]
    )


def group_modules(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """``modules``, each once and in order, in groups that need one scheme."""
    groups: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for module in dict.fromkeys(modules):
        expert = _EXPERT.match(module)
        groups[(expert["layer"],) if expert else tuple(fused_with(module))].append(module)
    return [tuple(found) for found in groups.values()]


def scheme_groups(modules: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """For each of ``modules`` those of them that need its scheme, itself among them, in order."""
    return {module: group for group in group_modules(modules) for module in group}
