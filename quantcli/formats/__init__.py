"""What the bytes mean: one block format, one file. Formats never hear of architectures."""

from typing import Any

from quantcli.formats.base import BlockFormat
from quantcli.registry import Registry

_NAMES = (
    "F32", "F16", "BF16",
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S",
    "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    "TQ1_0", "TQ2_0", "Q1_0", "Q2_0",
    "MXFP4", "NVFP4",
)  # fmt: skip


def _lack(found: Any) -> str | None:
    """What a plug-in's object lacks to be a block format that stands beside ours."""
    if not isinstance(found, BlockFormat):
        return f"it is of type {type(found).__name__}, not a quantcli.formats.BlockFormat"
    if found.block < 1 or found.nbytes < 1:
        return f"its blocks hold {found.block} weights in {found.nbytes} bytes"
    taken = {get_format(name).type_id: name for name in _NAMES}
    if found.type_id in taken:
        return f"ggml type {found.type_id} is {taken[found.type_id]}"
    return None


FORMATS = Registry(
    "block format",
    "formats",
    {name: f"quantcli.formats.{name.lower()}:FORMAT" for name in _NAMES},
    _lack,
)
"""By the name that GGUF has for them, in upper case."""


def get_format(name: str) -> BlockFormat:
    """The block format of that name; UsageError with near names when there is none."""
    found: BlockFormat = FORMATS.get(name)
    return found


def format_by_id(type_id: int) -> BlockFormat | None:
    """The block format with ggml's type id, or None when we have none."""
    return next((f for f in FORMATS.usable() if f.type_id == type_id), None)


__all__ = ["FORMATS", "BlockFormat", "format_by_id", "get_format"]
