"""FP8 scales of a key-value cache: ``X.k_scale`` and ``X.v_scale`` beside an attention module X.

The largest key, after rotary embeddings, and the largest value become 448. Source: vLLM's
``BaseKVCacheMethod``, which loads them for folders of compressed-tensors and of FP8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from quantcli.layouts.base import DTYPES, Patch
from quantcli.types import Declared

FP8_LARGEST = np.float32(448)
_TINY = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
"""What the references store in place of a scale of zero."""


def declare_cache(module: str, dtype: str) -> list[Declared]:
    """The tensors of one attention module."""
    return [Declared(f"{module}.{part}_scale", dtype, (1,)) for part in "kv"]


def place_cache(module: str, dtype: str, keys: float, values: float) -> Iterator[Patch]:
    """Their values, for the largest key and the largest value."""
    for part, largest in (("k", keys), ("v", values)):
        yield one_scale(f"{module}.{part}_scale", dtype, np.float32(largest) / FP8_LARGEST)


def one_scale(name: str, dtype: str, scale: Any) -> Patch:
    """A scale as it is stored; none becomes zero."""
    kind = DTYPES[dtype]
    stored = np.array([[scale]], np.float32).astype(kind)
    if not stored.any():
        stored = np.full((1, 1), _TINY[dtype], kind)
    return Patch(name, stored)
