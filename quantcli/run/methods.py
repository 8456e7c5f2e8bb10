"""How weights are moved or rounded: transforms keep the function, rounders choose the codes."""

from __future__ import annotations

from dataclasses import dataclass

from quantcli.errors import UsageError
from quantcli.registry import Registry

METHODS = Registry(
    "method",
    "methods",
    {
        "gptq": "quantcli.rounding.gptq:round_with_feedback",
        "awq": "quantcli.transforms.awq:awq",
        "smoothquant": "quantcli.transforms.smoothquant:smoothquant",
        "rotate": "quantcli.transforms.rotate:rotate",
        "tune": "quantcli.training.tune:tune_layer",
    },
)
"""Methods by the name that a user gives: of transforms, and of what rounds and trains."""

ROUNDER = "gptq"
TUNER = "tune"
_LAST = (ROUNDER, TUNER)


@dataclass(frozen=True, slots=True)
class Chain:
    """What to do in turn: ``transforms`` by name, round with feedback or without, then tune."""

    transforms: tuple[str, ...]
    feedback: bool
    tune: bool = False

    @property
    def rounds(self) -> bool:
        """Whether the model is run layer by layer to choose its codes."""
        return self.feedback or self.tune


def parse_methods(text: str) -> Chain:
    """The methods of "NAME,NAME"; UsageError for an unknown one, or one in the wrong place."""
    names = []
    for part in text.split(","):
        METHODS.get(part.strip())
        names.append(METHODS.canonical(part.strip()) or part)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--method {text} names {twice} twice")
    transforms = [name for name in names if name not in _LAST]
    in_turn = [*transforms, *(name for name in _LAST if name in names)]
    if names != in_turn:
        late = next(name for name, other in zip(names, in_turn, strict=True) if name != other)
        does = "rounds the weights" if late == ROUNDER else "trains what was rounded"
        raise UsageError(
            f"--method {text} has something after {late}, which {does}",
            hint=f"--method {','.join(in_turn)}",
        )
    return Chain(tuple(transforms), ROUNDER in names, TUNER in names)
