"""State-space mixers, which stand in a layer's place of attention, or beside it.

Their decay is stored as the logarithm of its negative, their convolution with an axis of one
channel, and a Mamba-2's vectors over heads become matrices of one column. Neither the convolution
nor the vectors are ever quantized.

Sources: Mamba (arXiv:2312.00752), Mamba-2 (arXiv:2405.21060), transformers' modeling_mamba.py and
modeling_mamba2.py, llama.cpp's src/models/mamba-base.cpp.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from quantcli.archs.config import Config, class_name, integer
from quantcli.archs.header import Header
from quantcli.archs.rules import Dims, Part, Rule, Size
from quantcli.errors import ArchitectureError
from quantcli.pieces import NegativeExp
from quantcli.types import MetaValue, u32

MAMBA2 = {
    "mamba_d_conv": "ssm.conv_kernel",
    "mamba_d_state": "ssm.state_size",
    "mamba_n_heads": "ssm.time_step_rank",
    "mamba_n_groups": "ssm.group_count",
}
"""config.json's names of sizes, as hybrids have them, and GGUF's."""

MAMBA1 = {
    "mamba_d_conv": "ssm.conv_kernel",
    "mamba_d_state": "ssm.state_size",
    "mamba_dt_rank": "ssm.time_step_rank",
}

STEP_LIMITS = ([0.0, float("inf")], (0.0, float("inf")), [0.0, {"__float__": "Infinity"}])
"""Spellings of time steps without limits, the only ones that llama.cpp computes."""


def mamba2(source: str, layers: Collection[int] | None = None) -> tuple[Rule, ...]:
    """The tensors of a Mamba-2 mixer whose names begin with ``source``."""

    def rule(name: str, inside: str, *shape: Size, **words: Any) -> Rule:
        return Rule(f"blk.{{i}}.{name}", f"{source}.{inside}", shape, layers=layers, **words)

    column: dict[str, Any] = {"stored": ("ssm_heads",), "parts": (Part(("ssm_heads",)),)}
    return (
        rule("ssm_in.weight", "in_proj.weight", "ssm_in", "hidden"),
        convolution(rule("ssm_conv1d.weight", "conv1d.weight", "ssm_conv", "kernel")),
        rule("ssm_conv1d.bias", "conv1d.bias", "ssm_conv"),
        rule("ssm_dt.bias", "dt_bias", "ssm_heads"),
        rule("ssm_a", "A_log", "ssm_heads", 1, pointwise=NegativeExp(), **column),
        rule("ssm_d", "D", "ssm_heads", 1, **column),
        rule(
            "ssm_norm.weight", "norm.weight", "ssm_groups", "ssm_group",
            stored=("ssm_inner",), parts=(Part(("ssm_groups", "ssm_group")),),
        ),
        rule("ssm_out.weight", "out_proj.weight", "hidden", "ssm_inner"),
    )  # fmt: skip


def mamba1(source: str, layers: Collection[int] | None = None) -> tuple[Rule, ...]:
    """The tensors of a Mamba mixer whose names begin with ``source``."""

    def rule(name: str, inside: str, *shape: Size, **words: Any) -> Rule:
        return Rule(f"blk.{{i}}.{name}", f"{source}.{inside}", shape, layers=layers, **words)

    return (
        rule("ssm_in.weight", "in_proj.weight", "ssm_in", "hidden"),
        convolution(rule("ssm_conv1d.weight", "conv1d.weight", "ssm_inner", "kernel")),
        rule("ssm_conv1d.bias", "conv1d.bias", "ssm_inner"),
        rule("ssm_x.weight", "x_proj.weight", "ssm_x", "ssm_inner"),
        rule("ssm_dt.weight", "dt_proj.weight", "ssm_inner", "ssm_rank"),
        rule("ssm_dt.bias", "dt_proj.bias", "ssm_inner"),
        rule("ssm_a", "A_log", "ssm_inner", "ssm_state", pointwise=NegativeExp()),
        rule("ssm_d", "D", "ssm_inner"),
        rule("ssm_out.weight", "out_proj.weight", "hidden", "ssm_inner"),
    )


def mamba1_dims(config: Config, hidden: int, names: Mapping[str, str] = MAMBA1) -> dict[str, int]:
    """Sizes of a Mamba mixer, twice as wide as the stream; ``names`` as for `mamba2_dims`."""
    kernel, state, rank = names
    ranks = -(-hidden // 16) if config.get(rank) == "auto" else integer(config, rank)
    states, inner = integer(config, state), 2 * hidden
    return {
        "hidden": hidden,
        "kernel": integer(config, kernel),
        "ssm_state": states,
        "ssm_rank": ranks,
        "ssm_inner": inner,
        "ssm_in": 2 * inner,
        "ssm_x": ranks + 2 * states,
    }


def mamba1_keys(dims: Dims) -> dict[str, MetaValue]:
    """The key-values of a Mamba mixer."""
    return {
        "ssm.conv_kernel": u32(dims["kernel"]),
        "ssm.inner_size": u32(dims["ssm_inner"]),
        "ssm.state_size": u32(dims["ssm_state"]),
        "ssm.time_step_rank": u32(dims["ssm_rank"]),
    }


def convolution(rule: Rule) -> Rule:
    """A rule for (channels, kernel) where an axis of one channel is stored between the two."""
    channels, kernel = rule.shape
    return replace(rule, stored=(channels, 1, kernel))


def mamba2_dims(
    config: Config, hidden: int, inner: int, names: Mapping[str, str] = MAMBA2
) -> dict[str, int]:
    """Sizes of a Mamba-2 mixer ``inner`` wide; ``names`` are config.json's, in `MAMBA2`'s order."""
    kernel, state, heads, groups = (integer(config, name) for name in names)
    if inner % heads or inner % groups or heads % groups:
        raise ArchitectureError(
            f"config.json of {class_name(config)} has {heads} heads in {groups} groups in a mixer "
            f"{inner} wide, expected multiples"
        )
    conv = inner + 2 * groups * state
    return {
        "hidden": hidden,
        "kernel": kernel,
        "ssm_state": state,
        "ssm_heads": heads,
        "ssm_groups": groups,
        "ssm_group": inner // groups,
        "ssm_inner": inner,
        "ssm_conv": conv,
        "ssm_in": inner + conv + heads,
    }


def mamba2_keys(dims: Dims) -> dict[str, MetaValue]:
    """The key-values of a Mamba-2 mixer."""
    return {
        "ssm.conv_kernel": u32(dims["kernel"]),
        "ssm.inner_size": u32(dims["ssm_inner"]),
        "ssm.state_size": u32(dims["ssm_state"]),
        "ssm.time_step_rank": u32(dims["ssm_heads"]),
        "ssm.group_count": u32(dims["ssm_groups"]),
    }


def mamba2_config(header: Header) -> dict[str, Any]:
    """`mamba2_keys` read backwards, for a hybrid."""
    inner, heads = header.keys.get("ssm.inner_size"), header.keys.get("ssm.time_step_rank")
    found = header.named(**MAMBA2)
    return {**found, "mamba_d_head": inner // heads} if inner and heads else found
