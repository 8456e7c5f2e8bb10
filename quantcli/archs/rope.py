"""Rotary position embeddings: from config.json's several spellings to GGUF's rope.* keys.

transformers 5 keeps everything in ``rope_parameters`` (for models whose layers differ, one entry
per layer type); older files have ``rope_theta`` and ``rope_scaling``. What llama.cpp's graph
does not compute for an architecture is refused, since a wrong rotation gives fluent nonsense.

Sources: YaRN (arXiv:2309.00071), LongRoPE (arXiv:2402.13753), transformers'
modeling_rope_utils.py, llama.cpp's llama-context.cpp and ggml_rope_ext.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs.config import Config, class_name, flag, integer, number, positive
from quantcli.archs.header import Header, shortest
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, array, f32, text, u32

_LAYER_TYPES = ("full_attention", "sliding_attention")

_OUTSIDE = (
    "max_position_embeddings", "original_max_position_embeddings", "partial_rotary_factor",
)  # fmt: skip
"""Parameters of the rotation that some files keep beside ``rope_parameters``."""

_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
_LENGTH = 8192
_TOLERANCE = 1e-5
"""Of Llama 3's divisors, which are rounded to float32."""

Rope = Mapping[str, Any]
"""``rope_type``, ``rope_theta`` and whatever parameters the type has; ``architectures`` too."""


def read_rope(
    config: Config, types: tuple[str, ...], *, partial: bool = False, sections: bool = False
) -> Rope:
    """The one rotation of all layers; its type must be among ``types``.

    ``partial``: a part of each head may be left unrotated. ``sections``: it may be shared out
    among time, height and width ("mrope_section").
    """
    found = _entries(config)
    if any(layer in found for layer in _LAYER_TYPES):
        raise ArchitectureError(
            f"rope_parameters in config.json differ by layer type, which {class_name(config)} "
            "does not have"
        )
    rope = _settle(config, found, types, "rope_theta", sections=sections)
    if not partial and number(rope, "partial_rotary_factor", default=1.0) != 1:
        raise ArchitectureError(
            f"config.json sets partial_rotary_factor to {rope['partial_rotary_factor']!r}, but "
            f"llama.cpp rotates whole heads of {class_name(config)}"
        )
    return rope


def read_layer_rope(config: Config, layer: str, theta_key: str, types: tuple[str, ...]) -> Rope:
    """The rotation of ``layer`` ("full_attention" or "sliding_attention").

    In older files ``rope_scaling`` is the full layers' alone, and ``theta_key`` holds the base.
    """
    found = _entries(config)
    if any(name in found for name in _LAYER_TYPES):
        found = found.get(layer) or {}
        if not isinstance(found, Mapping):
            raise ArchitectureError(
                f"rope_parameters of {class_name(config)} in config.json holds {found!r} for "
                f"{layer}, expected an object"
            )
    elif layer != "full_attention":
        found = {}
    return _settle(config, found, types, theta_key)


def rope_notes(config: Config) -> tuple[str, ...]:
    """What differs of a "dynamic" rotation, which llama.cpp does not know.

    Within the trained length it is the same as an unscaled one.
    """
    if _kind(_entries(config)) != "dynamic":
        return ()
    return (
        f"{class_name(config)} slows its rotation with the length of the text beyond "
        f"{integer(config, 'max_position_embeddings')} tokens (rope type 'dynamic'); llama.cpp "
        "does not, which differs beyond that length",
    )


def rope_keys(rope: Rope, *, betas: bool = False, head_dim: int = 0) -> dict[str, MetaValue]:
    """``rope.freq_base`` and, if the positions are scaled, ``rope.scaling.*``.

    ``betas``: llama.cpp reads yarn's two limits for this architecture. ``head_dim`` is needed by
    "ntk_alpha" alone.
    """
    keys = {"rope.freq_base": f32(positive(rope, "rope_theta"))}
    if rope["rope_type"] == "ntk_alpha":
        # Once for all lengths, unlike "dynamic".
        if head_dim <= 2:
            raise ArchitectureError(
                f"config.json of {class_name(rope)} has heads of {head_dim}, too small for alpha"
            )
        stretch = positive(rope, "alpha") ** (head_dim / (head_dim - 2))
        keys["rope.freq_base"] = f32(positive(rope, "rope_theta") * stretch)
    elif rope["rope_type"] == "linear":
        keys["rope.scaling.type"] = text("linear")
        keys["rope.scaling.factor"] = f32(positive(rope, "factor"))
    elif rope["rope_type"] == "yarn":
        keys["rope.scaling.type"] = text("yarn")
        keys["rope.scaling.factor"] = f32(positive(rope, "factor"))
        keys["rope.scaling.original_context_length"] = u32(
            integer(rope, "original_max_position_embeddings", "max_position_embeddings")
        )
        keys |= _beta_keys(rope, betas)
        attention = _attention_factor(rope) / _usual_factor(rope)
        if not math.isclose(attention, 1, rel_tol=1e-6):
            keys["rope.scaling.attn_factor"] = f32(attention)
    return keys


def section_keys(rope: Rope, pairs: int) -> dict[str, MetaValue]:
    """How the rotated ``pairs`` of a head are shared out among time, height and width."""
    sections = rope.get("mrope_section")
    if (
        not isinstance(sections, list)
        or not all(isinstance(part, int) and part >= 0 for part in sections)
        or sum(sections) != pairs
    ):
        raise ArchitectureError(
            f"mrope_section of {class_name(rope)} in config.json is {sections!r}, expected parts "
            f"of {pairs}"
        )
    return {"rope.dimension_sections": array("i32", [*sections, 0, 0, 0, 0][:4])}


def section_config(header: Header) -> dict[str, Any]:
    """`section_keys` read backwards."""
    found = header.keys.get("rope.dimension_sections")
    return {} if found is None else {"mrope_section": [int(part) for part in found if part]}


def rope_config(header: Header) -> dict[str, Any]:
    """`rope_keys` read backwards; 10000 is llama.cpp's base where a file names none."""
    keys = header.keys
    rope = {
        "rope_type": keys.get("rope.scaling.type", "default"),
        "rope_theta": keys.get("rope.freq_base", 10000.0),
    }
    if rope["rope_type"] == "none":
        rope["rope_type"] = "default"
    if rope["rope_type"] in ("linear", "yarn") and "rope.scaling.factor" in keys:
        rope["factor"] = keys["rope.scaling.factor"]
    if rope["rope_type"] == "yarn" and "rope.scaling.original_context_length" in keys:
        rope["original_max_position_embeddings"] = keys["rope.scaling.original_context_length"]
    if rope["rope_type"] == "yarn":
        for beta in _BETAS:
            if f"rope.scaling.yarn_{beta}" in keys:
                rope[beta] = keys[f"rope.scaling.yarn_{beta}"]
        if "rope.scaling.attn_factor" in keys and "factor" in rope:
            usual = _usual_factor({**rope, "architectures": ["a GGUF"]})
            rope["attention_factor"] = keys["rope.scaling.attn_factor"] * usual
    return rope


def llama3_factors(rope: Rope, head_dim: int) -> NDArray[np.float32]:
    """Divisors of the head_dim/2 rotation frequencies, as Llama 3.1 scales them.

    Wavelengths below ``original/high_freq_factor`` keep their frequency, those above
    ``original/low_freq_factor`` are slowed by ``factor``, and between them it is interpolated;
    Llama 4 has no between.
    """
    factor = number(rope, "factor")
    low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    if not 0 < low <= high or factor < 1:
        raise ArchitectureError(
            f"rope_parameters in config.json of {class_name(rope)} need factor ≥ 1 and "
            f"0 < low_freq_factor ≤ high_freq_factor, found {factor:g}, {low:g} and {high:g}"
        )
    original = integer(rope, "original_max_position_embeddings", "max_position_embeddings")
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    wavelengths = 2 * math.pi * positive(rope, "rope_theta") ** exponents
    turns = original / wavelengths
    kept = np.clip((turns - low) / (high - low), 0, 1) if low < high else turns >= low
    return (1 / ((1 - kept) / factor + kept)).astype(np.float32)


def llama3_rope(divisors: NDArray[np.float64], theta: float) -> dict[str, Any]:
    """Parameters of Llama 3's frequency scaling that give these divisors of the frequencies.

    The kept share of a frequency, clip(slope * frequency - offset, 0, 1), is a line between the
    two limits, so it is fitted where it is neither; only ratios to the original length matter,
    so that is a fixed one. Raises ArchitectureError when no parameters give the divisors.
    """
    half = len(divisors)
    frequencies = theta ** -(np.arange(half) / half) / (2 * math.pi)
    factor = shortest(float(divisors.max()))
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


def _entries(config: Config) -> Mapping[str, Any]:
    given = (config.get("rope_parameters"), config.get("rope_scaling"))
    found: Any = next((value for value in given if value is not None and value != {}), {})
    if not isinstance(found, Mapping):
        raise ArchitectureError(
            f"rope_parameters of {class_name(config)} in config.json is {found!r}, "
            "expected an object"
        )
    return found


def _settle(
    config: Config,
    found: Mapping[str, Any],
    types: tuple[str, ...],
    theta_key: str,
    *,
    sections: bool = False,
) -> Rope:
    kind = _kind(found)
    if kind == "dynamic" and "default" in types:
        kind = "default"
    if kind not in types or ("mrope_section" in found and not sections):
        shown = "mrope" if "mrope_section" in found else kind
        raise ArchitectureError(
            f"config.json sets the rope type {shown!r}, but llama.cpp computes "
            f"{class_name(config)} with {', '.join(types)} only"
        )
    theta = found.get("rope_theta")
    return {
        **{key: config.get(key) for key in _OUTSIDE},
        **{key: value for key, value in found.items() if value is not None},
        "rope_type": kind,
        "rope_theta": number(config, theta_key) if theta is None else theta,
        "architectures": config["architectures"],
    }


def _kind(found: Mapping[str, Any]) -> Any:
    kind = found.get("rope_type") or found.get("type") or "default"
    # Hunyuan's "dynamic" changes the base by alpha at every length, which is a type of its own.
    return "ntk_alpha" if kind == "dynamic" and found.get("alpha") else kind


def _usual_factor(rope: Rope) -> float:
    """By which the paper scales a rotated vector, and llama.cpp unless it is told otherwise."""
    return 1 + 0.1 * math.log(max(positive(rope, "factor"), 1))


def _attention_factor(rope: Rope) -> float:
    """By which transformers scales a rotated vector."""
    if rope.get("attention_factor") is not None:
        return positive(rope, "attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        logarithm = _usual_factor(rope) - 1
        over, under = (positive(rope, key) for key in ("mscale", "mscale_all_dim"))
        return (1 + over * logarithm) / (1 + under * logarithm)
    return _usual_factor(rope)


def _beta_keys(rope: Rope, read: bool) -> dict[str, MetaValue]:
    """The limits between which yarn mixes, where they are ``read`` or must be the paper's."""
    keys = {}
    for key, usual in _BETAS.items():
        found = number(rope, key, default=usual) or usual
        if math.isclose(found, usual, rel_tol=1e-6):
            continue
        if not read:
            raise ArchitectureError(
                f"config.json sets {key} of yarn to {found:g}, but llama.cpp computes "
                f"{class_name(rope)} with {usual:g} only"
            )
        keys[f"rope.scaling.yarn_{key}"] = f32(found)
    if not flag(rope, "truncate", True):
        raise ArchitectureError(
            "config.json sets truncate to false for yarn, which llama.cpp does not compute for "
            f"{class_name(rope)}"
        )
    return keys


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
