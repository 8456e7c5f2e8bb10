"""Quantized checkpoints as sources: which tensors make up a weight, and its float32 rows.

Every storage that is understood has a file in `quantcli.layouts`. A ``quantization_config`` of
another kind, codes without their scales, and shapes or groups that do not fit are refused when the
checkpoint is opened, before any work. Weights that were rounded once lose more when they are
rounded again; the plan says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcli.errors import SourceError
from quantcli.layouts import LAYOUTS, STORAGES, fp8
from quantcli.layouts.settings import read_beside, read_settings
from quantcli.layouts.stored import PackedWeight
from quantcli.sources.shards import Shards

_CACHES = re.compile(
    r"\.(q|k|v|kv|prob)(_output)?_(scale|zero_point|global_scale)$|\.[kv]_cache\.scale$"
)
"""Scales of attention and of key-value caches, which may be there beside weights as they are."""
_ACTIVATIONS = re.compile(
    r"(\.(input|output)|[._]activation)_(scale|scale_ub|zero_point|global_scale)$"
)
"""Scales of activations; only a runtime of the same kind has a use for them."""


def find_packed(shards: Shards, config: Mapping[str, Any], path: Path) -> dict[str, PackedWeight]:
    """Every weight that is not stored as it is, by its name; ``path`` is config.json's.

    SourceError when the checkpoint is quantized in a way that is not read, or is incomplete.
    """
    settings = read_settings(config, path) or read_beside(path)
    if settings is None or settings.method in fp8.METHODS:
        return dict(fp8.find_fp8(shards.tensors, settings))
    if settings.method in STORAGES:
        read = STORAGES.get(settings.method)
    elif settings.method in LAYOUTS:
        read = LAYOUTS.get(settings.method).read
    else:
        read = None
    if read is None:
        raise settings.refuse()
    found: dict[str, PackedWeight] = dict(read(shards, settings))
    if not found and not settings.may_be_plain:
        raise SourceError(
            f"{settings.where} says that the weights are quantized ({settings.method}), "
            "but no tensor is",
            hint=f"if they are not quantized, remove {settings.key} from config.json",
        )
    for name, weight in found.items():
        if name in shards.tensors and name not in weight.parts:
            raise SourceError(
                f"{weight.info.file}: holds tensor {name!r} both as it is and as "
                f"{weight.parts[0]!r}"
            )
    return found


def hidden_names(
    shards: Shards, packed: Mapping[str, PackedWeight], config: Mapping[str, Any], path: Path
) -> set[str]:
    """Stored tensors that are no weights: parts of packed ones, activations' and caches' scales.

    Those of activations only where something is quantized, if only a cache.
    """
    parts = {part for weight in packed.values() for part in weight.parts}
    is_quantized = bool(packed) or read_settings(config, path) is not None
    return parts | {
        name
        for name in shards.tensors
        if _CACHES.search(name) or (is_quantized and _ACTIVATIONS.search(name))
    }
