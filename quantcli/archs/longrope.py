"""LongRoPE: divisors of the rotation's frequencies, a list for the original context, one beyond.

GGUF holds them as two tensors, of which llama.cpp takes one for a whole run, by its context's
length; what they are scaled by goes to a key-value. Sources: arXiv:2402.13753, transformers'
modeling_rope_utils.py, llama.cpp's llama_model::get_rope_factors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.archs.config import class_name, integer, number, positive
from quantcli.archs.header import Header, shortest
from quantcli.archs.rope import Rope
from quantcli.archs.rules import Values
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, f32, u32

_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def long_keys(rope: Rope) -> dict[str, MetaValue]:
    """The original context, and what cosines and sines are multiplied by.

    That keeps the softmax as sharp as before; it is the usual factor where none is given.
    """
    original = integer(rope, "original_max_position_embeddings", "max_position_embeddings")
    factor = positive(rope, "factor", default=integer(rope, "max_position_embeddings") / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "rope.scaling.original_context_length": u32(original),
        "rope.scaling.attn_factor": f32(number(rope, "attention_factor", default=usual)),
    }


def long_values(rope: Rope, rotated: int) -> Values:
    """Both lists, for ``rotated`` values of a head."""
    return {
        _LONG: _factors(rope, "long_factor", rotated // 2),
        _SHORT: _factors(rope, "short_factor", rotated // 2),
    }


def long_config(header: Header) -> dict[str, Any]:
    """`long_keys` and `long_values` read backwards; empty where the file has no such tensors."""
    if _LONG not in header.shapes:
        return {}
    keys = header.keys
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": keys.get(
            "rope.scaling.original_context_length", keys.get("context_length")
        ),
        "attention_factor": keys.get("rope.scaling.attn_factor", 1.0),
        "long_factor": [shortest(float(x)) for x in header.read(_LONG).reshape(-1)],
        "short_factor": [shortest(float(x)) for x in header.read(_SHORT).reshape(-1)],
    }


def _factors(rope: Rope, key: str, half: int) -> NDArray[np.float32]:
    found = rope.get(key)
    if (
        not isinstance(found, list)
        or len(found) != half
        or not all(isinstance(x, int | float) and math.isfinite(x) and x > 0 for x in found)
    ):
        shown = f"{len(found)} values" if isinstance(found, list) else repr(found)
        raise ArchitectureError(
            f"{key} of {class_name(rope)}'s rotation in config.json is {shown}, "
            f"expected {half} positive numbers"
        )
    return np.array(found, dtype=np.float32)
