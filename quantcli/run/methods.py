"""The chain of methods behind ``--method NAME,NAME``: transforms, a rounder, a trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantcli.errors import UsageError
from quantcli.registry import near
from quantcli.rounding.base import ROUNDERS
from quantcli.training.base import TRAINERS
from quantcli.transforms.base import TRANSFORMS

_STAGES = (TRANSFORMS, ROUNDERS, TRAINERS)
_DOES = {1: "rounds the weights", 2: "trains what was rounded"}


@dataclass(frozen=True, slots=True)
class Chain:
    """What is done in turn, by name; without a rounder, weights are rounded to nearest."""

    transforms: tuple[str, ...] = ()
    rounder: str | None = None
    trainer: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them in turn."""
        return (*self.transforms, *(name for name in (self.rounder, self.trainer) if name))

    @property
    def rounds(self) -> bool:
        """Whether the model is run layer by layer to choose its codes."""
        return self.rounder is not None or self.trainer is not None

    @property
    def feeds_back(self) -> bool:
        """Whether the rounder feeds errors back, for which it needs Hessians."""
        return self.rounder is not None and "hessian" in ROUNDERS.get(self.rounder).needs


def parse_methods(text: str) -> Chain:
    """The methods of "NAME,NAME".

    UsageError for a name that is unknown, given twice or in the wrong place, for a second rounder
    or trainer, and for a plug-in that is not what its group asks for.
    """
    names = [_find(part.strip()) for part in text.split(",")]
    twice = next((name for _, name in names if names.count((_, name)) > 1), None)
    if twice is not None:
        raise UsageError(f"--method {text} names {twice} twice")
    in_turn = sorted(names, key=lambda found: found[0])
    if names != in_turn:
        late, name = next(a for a, b in zip(names, in_turn, strict=True) if a != b)
        raise UsageError(
            f"--method {text} has something after {name}, which {_DOES[late]}",
            hint=f"--method {','.join(name for _, name in in_turn)}",
        )
    stages = [tuple(name for at, name in names if at == stage) for stage in range(len(_STAGES))]
    for stage, does in _DOES.items():
        if len(stages[stage]) > 1:
            raise UsageError(
                f"--method {text} has two methods of which each {does}",
                hint=f"leave out {' or '.join(stages[stage])}",
            )
    return Chain(stages[0], *(next(iter(stage), None) for stage in stages[1:]))


def with_method(chain: Chain, name: str) -> Chain:
    """``chain`` with another transform, or with this rounder or trainer."""
    stage, name = _find(name)
    if stage == 0:
        return replace(chain, transforms=(*chain.transforms, name))
    return replace(chain, rounder=name) if stage == 1 else replace(chain, trainer=name)


def missing_reader(chain: Chain, option: str) -> str | None:
    """A rounder or trainer that reads this option of methods, where none in ``chain`` does."""
    stages = ((ROUNDERS, chain.rounder), (TRAINERS, chain.trainer))
    if any(name and option in registry.get(name).options for registry, name in stages):
        return None
    usable = (method for registry, _ in stages for method in registry.usable())
    return next((str(method.name) for method in usable if option in method.options), None)


def _find(name: str) -> tuple[int, str]:
    """The stage of a method, and the registry's spelling of its name."""
    for stage, registry in enumerate(_STAGES):
        known = registry.canonical(name)
        if known is not None:
            registry.get(known)
            return stage, known
    choices = [choice for registry in _STAGES for choice in registry]
    guesses = near(name, choices)
    raise UsageError(
        f"there is no method named {name!r}",
        hint=f"did you mean {' or '.join(guesses)}?" if guesses else "known: " + ", ".join(choices),
    )
