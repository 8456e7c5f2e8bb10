"""How weights are moved or rounded: transforms keep the function, rounders choose the codes."""

from __future__ import annotations

from quantcli.registry import Registry

METHODS = Registry(
    "method",
    "methods",
    {"gptq": "quantcli.methods.gptq:round_with_feedback"},
)
"""Methods by the name that a user gives."""


def parse_methods(text: str) -> tuple[str, ...]:
    """The methods of "NAME,NAME" by their own spelling; UsageError for an unknown one."""
    names = []
    for part in text.split(","):
        METHODS.get(part.strip())
        names.append(METHODS.canonical(part.strip()) or part)
    return tuple(names)
