"""How weights are moved or rounded: transforms keep the function, rounders choose the codes."""

from __future__ import annotations

from dataclasses import dataclass

from quantcli.errors import UsageError
from quantcli.registry import Registry

METHODS = Registry(
    "method",
    "methods",
    {
        "gptq": "quantcli.methods.gptq:round_with_feedback",
        "awq": "quantcli.methods.awq:awq",
        "smoothquant": "quantcli.methods.smoothquant:smoothquant",
        "rotate": "quantcli.methods.rotate:rotate",
    },
)
"""Methods by the name that a user gives: transforms of the weights, and one that rounds them."""

ROUNDER = "gptq"


@dataclass(frozen=True, slots=True)
class Chain:
    """What to do in turn: ``transforms`` by name, then round, with feedback or weight by weight."""

    transforms: tuple[str, ...]
    feedback: bool


def parse_methods(text: str) -> Chain:
    """The methods of "NAME,NAME"; UsageError for an unknown one, or one in the wrong place."""
    names = []
    for part in text.split(","):
        METHODS.get(part.strip())
        names.append(METHODS.canonical(part.strip()) or part)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--method {text} names {twice} twice")
    if ROUNDER in names[:-1]:
        others = [name for name in names if name != ROUNDER]
        raise UsageError(
            f"--method {text} has something after {ROUNDER}, which rounds the weights",
            hint=f"--method {','.join([*others, ROUNDER])}",
        )
    feedback = names[-1] == ROUNDER
    return Chain(tuple(names[:-1] if feedback else names), feedback)
