"""NVIDIA's ModelOpt: FP8 with a scale for the tensor or a row, and NVFP4.

``quant_algo`` names the kind. An NVFP4 ``X.weight`` is uint8 with ``X.weight_scale`` and
``X.weight_scale_2``. The kinds with scales on activations (``NVFP4_AWQ`` and others) are refused.
"""

from __future__ import annotations

from quantcli.layouts.float4 import NVFP4, build_float4
from quantcli.layouts.fp8 import find_fp8
from quantcli.layouts.settings import Settings
from quantcli.layouts.stored import PackedWeight, StoredTensors

_GROUP = 16


def find_modelopt(source: StoredTensors, settings: Settings) -> dict[str, PackedWeight]:
    """Every quantized weight; SourceError names the first part that is wrong."""
    if settings.is_of_caches:
        return {}
    kind = settings.values.get("quant_algo")
    if kind == "FP8":
        return dict(find_fp8(source.tensors, settings))
    if kind != NVFP4:
        raise settings.refuse()
    return {
        name: build_float4(source, info, name, "ModelOpt", _GROUP, whole=f"{name}_scale_2")
        for name, info in source.tensors.items()
        if info.dtype == "U8" and name.endswith(".weight")
    }
