"""Qwen3.5 and Qwen3.6, dense and with experts: llama.cpp's "qwen35" and "qwen35moe".

Value heads are stored in groups, those of one key after another. llama.cpp repeats the keys as a
whole, so it has the first head of each group, then the second of each, wherever value heads are
counted: in the rows that make values, gates, decays and learning rates, in the convolution and in
the columns that read them. The rotation is shared out among time, height and width, of which text
knows one.

Sources: `quantcli.archs.delta_net`; llama.cpp's src/models/qwen35moe.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs import delta_net
from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name
from quantcli.archs.decoder import MLP, layer
from quantcli.archs.header import Header
from quantcli.archs.qwen2_moe import mixture_keys
from quantcli.archs.rope import Rope, read_rope
from quantcli.archs.rules import Dims, Part, Rule, Size
from quantcli.errors import ArchitectureError
from quantcli.pieces import NegativeExp
from quantcli.types import MetaValue, array

_SECTIONS = [11, 11, 10]
"""transformers' shares of time, height and width in the rotated frequencies."""


def _in_turn(*inner: Size) -> Part:
    """Value heads by turns instead of in groups, each of ``inner``."""
    return Part(("key_heads", "sharers", *inner), (1, 0, *range(2, 2 + len(inner))))


def _behind_keys(columns: Size) -> tuple[Part, ...]:
    """Queries and keys, then values by turns."""
    return (
        Part(("keys", columns)),
        replace(_in_turn("state", columns), start="keys"),
    )


def _delta(name: str, source: str, *shape: str, **words: Any) -> Rule:
    return replace(layer(name, f"linear_attn.{source}", *shape), **words)


_DELTA_NET = (
    _delta("attn_qkv.weight", "in_proj_qkv.weight", "qkv", "hidden", parts=_behind_keys("hidden")),
    _delta(
        "attn_gate.weight", "in_proj_z.weight", "value", "hidden",
        parts=(_in_turn("state", "hidden"),),
    ),
    _delta(
        "ssm_beta.weight", "in_proj_b.weight", "value_heads", "hidden", parts=(_in_turn("hidden"),)
    ),
    _delta(
        "ssm_alpha.weight", "in_proj_a.weight", "value_heads", "hidden",
        parts=(_in_turn("hidden"),),
    ),
    _delta(
        "ssm_conv1d.weight", "conv1d.weight", "qkv", "kernel",
        stored=("qkv", 1, "kernel"), parts=_behind_keys("kernel"),
    ),
    _delta("ssm_a", "A_log", "value_heads", parts=(_in_turn(1),), pointwise=NegativeExp()),
    _delta("ssm_dt.bias", "dt_bias", "value_heads", parts=(_in_turn(1),)),
    delta_net.DELTA_NET[0],
    replace(
        delta_net.DELTA_NET[1],
        parts=(Part(("hidden", "key_heads", "sharers", "state"), (0, 2, 1, 3)),),
    ),
)  # fmt: skip


def _dense(config: Config) -> tuple[Rule, ...]:
    return delta_net.rules(config, _DELTA_NET, MLP)


def _mixture(config: Config) -> tuple[Rule, ...]:
    return delta_net.rules(config, _DELTA_NET, delta_net.EXPERTS)


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    rope = read_rope(config, delta_net.ROPE_TYPES, partial=True, sections=True)
    found = delta_net.keys(config, dims, rope)
    rotated = int(found["rope.dimension_count"].value)
    return {
        **found,
        "rope.dimension_sections": array("i32", _sections(rope, dims, rotated)),
    }


def _mixture_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    found = {**_keys(config, dims), **mixture_keys(config, dims)}
    del found["feed_forward_length"]
    return found


def _sections(rope: Rope, dims: Dims, rotated: int) -> list[int]:
    """Shares of time, height and width, which take turns; a head's size of them at most.

    A frequency that none of them reaches llama.cpp leaves unturned.
    """
    half = rotated // 2
    fits = sum(_SECTIONS) <= dims["head_dim"]
    usual = _SECTIONS if fits else [(half + 2 - part) // 3 for part in range(3)]
    found = rope.get("mrope_section", usual)
    whole = isinstance(found, list) and len(found) >= 3
    if (
        not whole
        or any(not isinstance(part, int) or part < 0 for part in found)
        or not 0 < sum(found) <= dims["head_dim"]
        or any(turn >= 3 * found[turn % 3] for turn in range(min(half, sum(found))))
    ):
        raise ArchitectureError(
            f"mrope_section of {class_name(rope)} in config.json is {found!r}, expected shares of "
            f"{half} frequencies that take turns, such as {usual}"
        )
    return [*found, 0, 0, 0, 0][:4]


def _config(header: Header) -> dict[str, Any]:
    return _rebuilt(header, "Qwen3_5ForCausalLM", "qwen3_5_text")


def _mixture_config(header: Header) -> dict[str, Any]:
    return {
        **_rebuilt(header, "Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"),
        **delta_net.rebuilt_experts(header),
    }


def _rebuilt(header: Header, model: str, model_type: str) -> dict[str, Any]:
    config = delta_net.rebuilt(header, model, model_type)
    sections = header.keys.get("rope.dimension_sections")
    if sections is not None:
        config["rope_parameters"]["mrope_section"] = [int(part) for part in sections][:3]
        config["rope_parameters"]["mrope_interleaved"] = True
    return config


QWEN3_5 = Architecture(
    name="qwen35",
    read_dims=delta_net.mixer_dims,
    read_rules=_dense,
    to_keys=_keys,
    to_config=_config,
    defaults={**delta_net.DEFAULTS, "num_key_value_heads": 4},
    fixed=delta_net.FIXED,
    renames=delta_net.RENAMES,
    folds=delta_net.FOLDS,
    mtp=delta_net.mtp(MLP),
)
QWEN3_5_MOE = Architecture(
    name="qwen35moe",
    read_dims=delta_net.mixer_dims,
    read_rules=_mixture,
    to_keys=_mixture_keys,
    to_config=_mixture_config,
    defaults={**delta_net.DEFAULTS, "num_key_value_heads": 2},
    fixed=delta_net.FIXED,
    renames=delta_net.RENAMES,
    folds=delta_net.FOLDS,
    mtp=delta_net.mtp(delta_net.EXPERTS),
)
