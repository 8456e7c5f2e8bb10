"""Scales that are found beforehand: of a module's activations, and of a key-value cache.

Beside a module lie ``X.input_scale``, of asymmetric integers ``X.input_zero_point``, or of NVFP4
``X.input_global_scale``, by which the scales of 16 are divided that a runtime finds as it runs;
beside an attention module ``X.k_scale`` and ``X.v_scale``. Source: ``initialize_qparams``,
``calculate_qparams`` and ``generate_gparam`` of compressed-tensors 0.20, for extremes over all
tokens ("static_minmax").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from quantcli.layouts.base import CacheScales, Extremes, InputScales, Patch
from quantcli.layouts.cache_scales import FP8_LARGEST, declare_cache, one_scale, place_cache
from quantcli.layouts.compressed_tensors.groups import describe_config
from quantcli.layouts.scaled import INT8
from quantcli.types import Declared

_FP4_LARGEST = np.float32(6)
_STEPS = np.float32(255)
_LOW, _HIGH = -128, 127


def _declare(module: str, inputs: Mapping[str, Any], dtype: str) -> list[Declared]:
    if inputs["strategy"] == "tensor_group":
        return [Declared(f"{module}.input_global_scale", "F32", (1,))]
    found = [Declared(f"{module}.input_scale", dtype, (1,))]
    if not inputs["symmetric"]:
        found.append(Declared(f"{module}.input_zero_point", INT8, (1,)))
    return found


def _place(module: str, inputs: Mapping[str, Any], dtype: str, seen: Extremes) -> Iterator[Patch]:
    low, high, largest = (np.float32(value) for value in (seen.low, seen.high, seen.largest))
    if inputs["strategy"] == "tensor_group":
        whole = FP8_LARGEST * _FP4_LARGEST / largest
        yield one_scale(f"{module}.input_global_scale", "F32", whole)
        return
    if inputs["type"] == "float":
        scale = largest / FP8_LARGEST
    elif inputs["symmetric"]:
        scale = largest / (_STEPS / np.float32(2))
    else:
        scale = (high - low) / _STEPS
    stored = one_scale(f"{module}.input_scale", dtype, scale)
    yield stored
    if not inputs["symmetric"]:
        zero = _LOW - low / np.float32(stored.values[0, 0])
        codes = np.array([[np.clip(np.rint(zero), _LOW, _HIGH)]], np.int8)
        yield Patch(f"{module}.input_zero_point", codes)


INPUT_SCALES = InputScales(_declare, _place)
FP8_CACHE = CacheScales(
    {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor",
        "group_size": None,
        "dynamic": False,
    },
    declare_cache,
    place_cache,
    describe_config,
)
