"""Model-folder layouts: how codes, scales and zero points are stored, written and read back.

A layout that is written is a `quantcli.layouts.base.Layout` and a line in `LAYOUTS`, or an entry
point of a plug-in; storages are read only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from quantcli.layouts.settings import MLX
from quantcli.registry import Registry, not_callable

if TYPE_CHECKING:
    from quantcli.layouts.base import Layout

_HERE = "quantcli.layouts"
FLOATS = "hf"
"""The layout without codes."""
FP8 = "fp8"
"""The layout of FP8 alone."""


def _check_layout(found: object) -> str | None:
    from quantcli.layouts.base import Layout

    if isinstance(found, Layout):
        return None
    return f"it is of type {type(found).__name__}, not a quantcli.layouts.base.Layout"


OF_RUNTIMES = {
    "vllm": "compressed-tensors", "sglang": "compressed-tensors", "transformers": FLOATS,
    "ollama": "gguf", "llama.cpp": "gguf", "lmstudio": "gguf",
}  # fmt: skip
"""The format that somebody may mean who names a runtime, in lower case."""

LAYOUTS = Registry(
    "output format",
    "layouts",
    {
        FLOATS: f"{_HERE}.hf:HF",
        "compressed-tensors": f"{_HERE}.compressed_tensors:COMPRESSED_TENSORS",
        "gptq": f"{_HERE}.gptq:GPTQ",
        "gptq-v2": f"{_HERE}.gptq:GPTQ_V2",
        "awq": f"{_HERE}.awq:AWQ",
        MLX: f"{_HERE}.mlx:MLX",
        FP8: f"{_HERE}.fp8:FP8",
    },
    _check_layout,
)
"""By the name that ``--to`` takes, which is also the ``quant_method`` of what it reads."""

STORAGES = Registry(
    "quantized storage",
    "storages",
    {
        "bitsandbytes": f"{_HERE}.bitsandbytes:find_bitsandbytes",
        "modelopt": f"{_HERE}.modelopt:find_modelopt",
        "mxfp4": f"{_HERE}.mxfp4:find_mxfp4",
    },
    not_callable,
)
"""``quant_method`` -> what reads it: a function like `Layout.read`."""


def code_layouts() -> list[str]:
    """The names of the layouts that store codes."""
    return [name for name in LAYOUTS if name != FLOATS]


def find_layout(name: str) -> Layout:
    """The layout of that name; UsageError with near names when there is none."""
    return cast("Layout", LAYOUTS.get(name))
