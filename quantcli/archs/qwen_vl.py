"""The text models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: "qwen2vl", "qwen3vl", "qwen3vlmoe".

Qwen2 and Qwen3 whose rotation is shared out among time, height and width; the shares are a
key-value, and text turns by all three alike. llama.cpp leaves two of the slowest frequencies of
Qwen3-VL unturned, 0.01 rad at 32,000 tokens. Qwen3-VL also tells into how many layers the vision
tower's inner states go. Experts are published stacked and transposed; transformers turns them
when it reads them. On the way back they are Qwen2, Qwen3 and Qwen3-MoE, which compute the same of
text.
Sources: arXiv:2409.12191, arXiv:2502.13923, transformers' modeling_qwen2_5_vl.py and
modeling_qwen3_vl.py, llama.cpp's src/models/qwen2vl.cpp and qwen3vl.cpp.
"""

from __future__ import annotations

from dataclasses import replace

from quantcli.archs.config import Config, class_name, number
from quantcli.archs.decoder import check_square, decoder_keys, expert_keys
from quantcli.archs.qwen2 import QWEN2
from quantcli.archs.qwen3 import QWEN3
from quantcli.archs.qwen3_moe import QWEN3_MOE
from quantcli.archs.rope import read_rope, rope_keys, section_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.archs.wrappers import unwrapped
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, u32

_SMALLEST = 1e-5
_ROPE_TYPES = ("default", "mrope")


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    rope = read_rope(config, _ROPE_TYPES, sections=True)
    return {
        **decoder_keys(config, dims),
        **rope_keys({**rope, "rope_type": "default"}),
        **section_keys(rope, dims["head_dim"] // 2),
    }


def _check(config: Config, dims: Dims) -> None:
    check_square(config, dims)
    epsilon = number(config, "rms_norm_eps")
    if epsilon > _SMALLEST:
        raise ArchitectureError(
            f"rms_norm_eps of {class_name(config)} in config.json is {epsilon:g}, but llama.cpp "
            f"computes it without one, which is the same up to {_SMALLEST:g} only"
        )


def _deepstack(config: Config) -> dict[str, MetaValue]:
    tower = config.get("vision_config") or {}
    return {"n_deepstack_layers": u32(len(tower.get("deepstack_visual_indexes") or []))}


def _deep_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {**_keys(config, dims), **_deepstack(config)}


def _mixture_keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        **_deep_keys(config, dims),
        **expert_keys(config, dims),
        "expert_feed_forward_length": u32(dims["expert_ff"]),
    }


def _mixture_rules(config: Config) -> tuple[Rule, ...]:
    return tuple(
        replace(rule, fused=replace(rule.fused, transpose=None)) if rule.fused else rule
        for rule in QWEN3_MOE.read_rules(config)
    )


QWEN2_VL = replace(
    unwrapped(QWEN2),
    name="qwen2vl",
    check=_check,
    to_keys=_keys,
)
QWEN3_VL = replace(
    unwrapped(QWEN3),
    name="qwen3vl",
    to_keys=_deep_keys,
)
QWEN3_VL_MOE = replace(
    unwrapped(QWEN3_MOE),
    name="qwen3vlmoe",
    read_rules=_mixture_rules,
    to_keys=_mixture_keys,
    defaults={**QWEN3_MOE.defaults, "norm_topk_prob": True, "rope_theta": 500000.0},
)
