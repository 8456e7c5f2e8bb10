"""From a GGUF's key-values back to a config.json that transformers understands.

The families' tables turn a configuration into key-values; here each family has the way back, and
the result is checked by going forth again: every key-value must come out as it stands in the
file, so a model that these tables do not describe is refused rather than computed otherwise.
What GGUF does not say is what llama.cpp takes for granted (`Architecture.fixed`).

Numbers are stored in float32 and come back as the shortest decimal that rounds to them, which is
what a publisher wrote. Of Llama 3's frequency scaling only the divisors are stored; `llama3_rope`
finds parameters that give them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs import find_architecture
from quantcli.archs.gemma2 import layer_pattern
from quantcli.archs.rope import llama3_factors
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue

Read = Callable[[str], NDArray[np.float32]]
"""Gives the values of a small tensor, by its GGUF name."""

_DECODER = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_MIXTURE = {"num_experts_per_tok": "expert_used_count"}
_GEMMA = {"final_logit_softcapping": "final_logit_softcapping"}
_GPT2 = {
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_positions": "context_length",
    "n_head": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
_LENGTH = 8192
_TOLERANCE = 1e-5
"""Of Llama 3's divisors, which are rounded to float32."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF says about its model: key-values without the architecture's prefix, shapes."""

    keys: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Read

    def named(self, table: Mapping[str, str]) -> dict[str, Any]:
        """The configuration's keys of ``table`` that the file has."""
        return {ours: self.keys[key] for ours, key in table.items() if key in self.keys}


def rebuild_config(
    arch: str,
    metadata: Mapping[str, MetaValue],
    shapes: Mapping[str, tuple[int, ...]],
    read: Read,
) -> dict[str, Any]:
    """The configuration of a GGUF's model: its architecture, key-values and tensors' shapes.

    Raises ArchitectureError when the architecture is unknown or the way forth gives other values.
    """
    if arch not in _FAMILIES:
        raise ArchitectureError(
            f"the configuration of a {arch} model cannot be told from its GGUF",
            hint="--config names a folder with its config.json",
        )
    prefix = f"{arch}."
    keys = {k.removeprefix(prefix): _plain(v) for k, v in metadata.items() if k.startswith(prefix)}
    header = Header(keys, shapes, read)
    if "token_embd.weight" not in shapes:
        raise ArchitectureError("the GGUF has no tensor token_embd.weight")
    config = {
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **_FAMILIES[arch](header),
    }
    for key, value in find_architecture(config).metadata(config).items():
        if key in metadata and not _same(metadata[key].value, value.value):
            raise ArchitectureError(
                f"the GGUF sets {key} to {metadata[key].value!r}, but quantcli knows {arch} "
                f"models of this kind with {value.value!r} only",
                hint="--config names a folder with its config.json",
            )
    return config


def _plain(value: MetaValue) -> Any:
    return _shortest(value.value) if value.kind == "f32" else value.value


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        return isinstance(found, int | float) and np.float32(found) == np.float32(expected)
    return bool(found == expected)


def _class(name: str, model_type: str) -> dict[str, Any]:
    return {"architectures": [name], "model_type": model_type}


def _rope(header: Header, theta: str = "rope.freq_base") -> dict[str, Any]:
    """One rotation; 10000 is llama.cpp's base where a file names none."""
    keys = header.keys
    rope = {
        "rope_type": keys.get("rope.scaling.type", "default"),
        "rope_theta": keys.get(theta, 10000.0),
    }
    if rope["rope_type"] == "none":
        rope["rope_type"] = "default"
    if rope["rope_type"] in ("linear", "yarn") and "rope.scaling.factor" in keys:
        rope["factor"] = keys["rope.scaling.factor"]
    if rope["rope_type"] == "yarn" and "rope.scaling.original_context_length" in keys:
        rope["original_max_position_embeddings"] = keys["rope.scaling.original_context_length"]
    return rope


def _decoder(header: Header) -> dict[str, Any]:
    return {**header.named(_DECODER), "rope_parameters": _rope(header)}


def _llama(header: Header) -> dict[str, Any]:
    config = _decoder(header)
    if "head_dim" not in config and "rope.dimension_count" in header.keys:
        config["head_dim"] = header.keys["rope.dimension_count"]
    if "rope_freqs.weight" in header.shapes:
        divisors = header.read("rope_freqs.weight").reshape(-1).astype(np.float64)
        config["rope_parameters"] = llama3_rope(divisors, config["rope_parameters"]["rope_theta"])
    if header.keys.get("expert_count"):
        experts = {"num_local_experts": header.keys["expert_count"], **header.named(_MIXTURE)}
        return {**_class("MixtralForCausalLM", "mixtral"), **config, **experts}
    return {
        **_class("LlamaForCausalLM", "llama"),
        **config,
        "attention_bias": "blk.0.attn_output.bias" in header.shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.shapes,
    }


def _qwen2(header: Header) -> dict[str, Any]:
    return {**_class("Qwen2ForCausalLM", "qwen2"), **_decoder(header)}


def _qwen3(header: Header) -> dict[str, Any]:
    return {**_class("Qwen3ForCausalLM", "qwen3"), **_decoder(header)}


def _qwen3_moe(header: Header) -> dict[str, Any]:
    experts = {"num_experts": "expert_count", "moe_intermediate_size": "expert_feed_forward_length"}
    return {
        **_class("Qwen3MoeForCausalLM", "qwen3_moe"),
        **_decoder(header),
        **header.named({**_MIXTURE, **experts}),
        "norm_topk_prob": True,
    }


def _scale(header: Header, config: Mapping[str, Any], layers_of_27b: int) -> dict[str, Any]:
    """The attention's scale, which llama.cpp derives as `gemma2.check_scale` says."""
    scale = config.get("head_dim", 256)
    if config.get("num_hidden_layers") == layers_of_27b:
        scale = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": scale, **header.named(_GEMMA)}


def _gemma2(header: Header) -> dict[str, Any]:
    config = _decoder(header)
    more = {
        "sliding_window": "attention.sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
    }
    return {
        **_class("Gemma2ForCausalLM", "gemma2"),
        **config,
        **_scale(header, config, 46),
        **header.named(more),
    }


def _gemma3(header: Header) -> dict[str, Any]:
    config = _decoder(header)
    layers = int(config.get("num_hidden_layers", 1))
    windowed = "attention.sliding_window" in header.keys
    return {
        **_class("Gemma3ForCausalLM", "gemma3_text"),
        **config,
        **_scale(header, config, 62),
        **header.named({"sliding_window": "attention.sliding_window"}),
        "layer_types": layer_pattern(layers, 6) if windowed else ["full_attention"] * layers,
        "rope_parameters": {
            "full_attention": _rope(header),
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": header.keys.get("rope.freq_base_swa", 10000.0),
            },
        },
    }


def _phi3(header: Header) -> dict[str, Any]:
    config = _decoder(header)
    keys = header.keys
    rope = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    if "rope.dimension_count" in keys and config.get("head_dim"):
        rope["partial_rotary_factor"] = keys["rope.dimension_count"] / config["head_dim"]
    original = keys.get("rope.scaling.original_context_length", keys.get("context_length"))
    if "rope_factors_long.weight" in header.shapes:
        rope |= {
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
            "attention_factor": keys.get("rope.scaling.attn_factor", 1.0),
            **{
                f"{kind}_factor": [
                    _shortest(float(x))
                    for x in header.read(f"rope_factors_{kind}.weight").reshape(-1)
                ]
                for kind in ("long", "short")
            },
        }
    return {
        **_class("Phi3ForCausalLM", "phi3"),
        **config,
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        "sliding_window": keys.get("attention.sliding_window") or None,
    }


def _gpt2(header: Header) -> dict[str, Any]:
    return {**_class("GPT2LMHeadModel", "gpt2"), **header.named(_GPT2)}


_FAMILIES: Mapping[str, Callable[[Header], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
}


def llama3_rope(divisors: NDArray[np.float64], theta: float) -> dict[str, Any]:
    """Parameters of Llama 3's frequency scaling that give these divisors of the frequencies.

    The kept share of a frequency, clip(slope * frequency - offset, 0, 1), is a line between the
    two limits, so it is fitted where it is neither; only ratios to the original length matter,
    so that is a fixed one. Raises ArchitectureError when no parameters give the divisors.
    """
    half = len(divisors)
    frequencies = theta ** -(np.arange(half) / half) / (2 * math.pi)
    factor = _shortest(float(divisors.max()))
    if factor <= 1:
        return {"rope_type": "default", "rope_theta": theta}
    slope, offset = _line(frequencies, (1 / divisors - 1 / factor) / (1 - 1 / factor))
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": _LENGTH * offset / slope,
        "high_freq_factor": _LENGTH * (1 + offset) / slope,
        "original_max_position_embeddings": _LENGTH,
    }
    try:
        again = llama3_factors({**rope, "architectures": ["LlamaForCausalLM"]}, 2 * half)
    except ArchitectureError:
        again = np.zeros(half, np.float32)
    if not np.allclose(again, divisors, rtol=_TOLERANCE, atol=0):
        raise ArchitectureError(
            "rope_freqs.weight does not hold the divisors of Llama 3's frequency scaling",
            hint="--config names a folder with the model's config.json",
        )
    return rope


def _line(frequencies: NDArray[np.float64], kept: NDArray[np.float64]) -> tuple[float, float]:
    """Slope and offset of a line through the shares strictly between 0 and 1."""
    inner = (kept > 1e-6) & (kept < 1 - 1e-6)
    places, shares = frequencies[inner], kept[inner]
    if len(places) < 2:
        # Too few points: any line will do that reaches the limits between its neighbours.
        above, below = frequencies[kept >= 1 - 1e-6], frequencies[kept <= 1e-6]
        if not len(above) or not len(below):
            return 1.0, 0.0
        high, low = above.min(), below.max()
        if not len(places):
            slope = 1 / (high - low)
            return slope, slope * low
        slope = max((1 - shares[0]) / (high - places[0]), shares[0] / (places[0] - low))
        return float(slope), float(slope * places[0] - shares[0])
    slope, negative = np.polyfit(places, shares, 1, w=1 / np.sqrt(places))
    return float(slope), -float(negative)
