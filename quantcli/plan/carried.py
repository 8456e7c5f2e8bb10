"""Scales of activations and of key-value caches that go along with codes into another layout.

They lie beside weights as one value each: ``X.input_scale`` of FP8 activations brings the largest
one to 448, ModelOpt's of NVFP4 to 448 * 6, of which compressed-tensors stores the reciprocal,
``X.input_global_scale``; ``Y.k_scale`` and ``Y.v_scale`` of an attention module bring the largest
key and value to 448. Sources: vLLM's ModelOpt and compressed-tensors schemes, which load them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from quantcli.errors import PlanError
from quantcli.formats.float_grid import FloatGrid
from quantcli.layouts.base import CodeGrid, Extremes, Layout
from quantcli.layouts.stored_codes import CodedStore
from quantcli.model import Model
from quantcli.plan.caches import CacheOwner, find_caches
from quantcli.types import Matrix

CACHE: Literal["fp8"] = "fp8"
_FP8, _FP4 = np.float32(448), np.float32(6)
_WEIGHT = ".weight"


@dataclass(frozen=True)
class Carried:
    """What is taken over: ``inputs`` by the matrices' modules, ``caches`` by attention modules.

    ``names`` are the stored tensors that hold it.
    """

    inputs: Mapping[str, Extremes] = field(default_factory=dict)
    owners: tuple[CacheOwner, ...] = ()
    caches: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    names: frozenset[str] = frozenset()


def find_cache_scales(model: Model, store: CodedStore, layout: Layout) -> Carried:
    """Those of the caches, where the layout holds them and each attention module has both."""
    beside = set(store.passed_over)
    if CACHE not in layout.caches or not any(name.endswith(".k_scale") for name in beside):
        return Carried()
    if not _is_fp8(model.config):
        return Carried()
    try:
        owners = find_caches(model)
    except PlanError:
        return Carried()
    found, names = {}, set()
    for owner in owners:
        own = [f"{owner.module}.{part}_scale" for part in "kv"]
        scales = [_read(store, name) if name in beside else None for name in own]
        keys, values = scales
        if keys is None or values is None:
            return Carried()
        found[owner.module] = (float(keys * _FP8), float(values * _FP8))
        names.update(own)
    return Carried(owners=owners, caches=found, names=frozenset(names))


def input_extremes(
    store: CodedStore, matrix: Matrix, grid: CodeGrid
) -> tuple[str, Extremes] | None:
    """The stored scale of a matrix's activations, and what it says was the largest of them.

    None where there is none of a kind that another layout has too.
    """
    if not isinstance(grid, FloatGrid):
        return None
    module, beside = matrix.source.removesuffix(_WEIGHT), set(store.passed_over)
    most = _FP8 * _FP4 if grid.scales == "E4M3" else _FP8
    for part in ("input_scale", "input_global_scale"):
        name = f"{module}.{part}"
        scale = _read(store, name) if name in beside else None
        if scale is not None:
            largest = float(most * scale if part == "input_scale" else most / scale)
            return name, Extremes(-largest, largest)
    return None


def _is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a cache's scales are of FP8: what says nothing of its kind is."""
    settings = config.get("quantization_config")
    scheme = settings.get("kv_cache_scheme") if isinstance(settings, Mapping) else None
    if not isinstance(scheme, Mapping):
        return True
    return (scheme.get("type", "float"), scheme.get("num_bits", 8)) == ("float", 8)


def _read(store: CodedStore, name: str) -> np.float32 | None:
    """A scale of one positive number; None for anything else."""
    values = store.read_beside(name)
    if values.size != 1:
        return None
    scale = np.float32(values.reshape(-1)[0])
    return scale if np.isfinite(scale) and scale > 0 else None
