"""Quantized checkpoints as sources: which tensors make up a weight, and its float32 rows.

Every storage that is understood has a file in `quantcli.layouts`. A ``quantization_config`` of
another kind, codes without their scales, and shapes or groups that do not fit are refused when the
checkpoint is opened, before any work. Weights that were rounded once lose more when they are
rounded again; the plan says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcli.errors import SourceError
from quantcli.layouts import LAYOUTS, STORAGES, fp8
from quantcli.layouts.settings import read_beside, read_settings
from quantcli.layouts.stored import PackedWeight
from quantcli.sources.shards import Shards

_ACTIVATIONS = (
    ".input_scale", ".input_scale_ub", ".output_scale", ".activation_scale", "_activation_scale",
    ".input_zero_point", ".output_zero_point", ".input_global_scale",
)  # fmt: skip
"""Scales of activations; only a runtime of the same kind has a use for them."""
_CACHES = tuple(
    f".{part}" for part in (
        "q_scale", "k_scale", "v_scale", "kv_scale", "k_zero_point", "v_zero_point",
    )
)  # fmt: skip
"""Scales of the key-value cache, which may be there beside weights as they are."""


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


def hidden_names(shards: Shards, packed: Mapping[str, PackedWeight]) -> set[str]:
    """Stored tensors that are no weights: parts of packed ones, activations' and caches' scales."""
    parts = {part for weight in packed.values() for part in weight.parts}
    endings = (*_CACHES, *(_ACTIVATIONS if packed else ()))
    return parts | {name for name in shards.tensors if name.endswith(endings)}
