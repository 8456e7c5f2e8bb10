"""A checkpoint of plain floats: block formats decoded again, to try a type in any runtime."""

from __future__ import annotations

from quantcli.layouts import FLOATS
from quantcli.layouts.base import Layout


def _usage(name: str) -> str:
    return f"transformers.AutoModelForCausalLM.from_pretrained({name!r})"


HF = Layout(
    name=FLOATS,
    help="any --type, decoded again, to try a type in any runtime",
    usage=_usage,
)
