"""The protocol of a transform, and the transforms by the name that a user gives.

A transform changes float weights and keeps the model's function. It searches fold groups for
operations (`quantcli.transforms.spec`) that make rounding cost less, on the model as the
transforms before it leave it. Plug-ins register one in the entry-point group
``quantcli.transforms``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from quantcli.model import Model
from quantcli.registry import Registry, lacks_attributes
from quantcli.statistics.input_statistics import NEEDS, InputStatistics
from quantcli.transforms.output_error import RoundRows
from quantcli.transforms.spec import TransformSpec
from quantcli.types import Event


@dataclass(frozen=True, slots=True)
class TransformOptions:
    """Options of transforms.

    ``seed`` draws rotations; ``alpha`` is SmoothQuant's, None to search it; ``margin`` is by how
    much a search must lower a group's loss, None for each transform's default; ``weighted`` says
    that rounding will know the columns' importance, ``feedback`` that it will feed errors back,
    ``groups`` that many columns share a scale.
    ``dtypes`` are those that stored tensors will be written in, by name, where norms are not
    written as float32.
    """

    seed: int = 0
    alpha: float | None = None
    margin: float | None = None
    weighted: bool = True
    feedback: bool = False
    groups: bool = False
    threads: int = 1
    dtypes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GroupOutcome:
    """What a search did to one group, or to one expert's part of it.

    Losses are squared errors of the consumers' outputs as parts of these outputs' squares, on the
    mean over the consumers. ``choice`` names the scales that were folded, or is empty where none
    were clearly better.
    """

    group: str
    matrix: int
    before: float
    after: float
    choice: str


@dataclass(frozen=True, slots=True)
class TransformFound(Event):
    """A transform's result; ``outcomes`` has one entry for each group that was searched."""

    transform: TransformSpec
    outcomes: tuple[GroupOutcome, ...] = ()

    @property
    def details(self) -> tuple[str, ...]:
        """A sentence for each group."""
        return tuple(
            f"{group.group}: loss {group.before:.3g} -> {group.after:.3g}, "
            f"{group.choice or 'left as it is'}"
            for group in self.outcomes
        )


class Transform(Protocol):
    """A change of float weights that keeps the model's function."""

    @property
    def name(self) -> str:
        """The name in ``--method``."""

    @property
    def options(self) -> tuple[str, ...]:
        """The fields of `TransformOptions` that it reads."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics of inputs that it reads, such as "hessian"."""

    def check(self, model: Model, earlier: Sequence[str]) -> None:
        """Refuse, before any work, a model or ``earlier`` transforms that it does not fit.

        Raises ArchitectureError for a model whose function it would change, PlanError for an
        order in which one transform takes from the next what it needs.
        """

    def find(
        self, model: Model, grids: Mapping[str, RoundRows], statistics: InputStatistics,
        options: TransformOptions,
    ) -> Iterator[Event]:  # fmt: skip
        """Yield progress and notes, at last `TransformFound` for ``model``.

        ``statistics`` holds what the transform `needs`, and nothing where it needs nothing.
        ``grids`` rounds the rows of each tensor that will be rounded. A search in several steps
        yields `TransformFound` after each, for the model as the steps before leave it.
        """


def _lack(found: Any) -> str | None:
    lack = lacks_attributes("name", "options", "needs", "check", "find")(found)
    if lack is not None:
        return lack
    known = {field.name for field in fields(TransformOptions)}
    for what, named, all_of in (
        ("option", found.options, known), ("statistic", found.needs, set(NEEDS))
    ):  # fmt: skip
        for name in named:
            if name not in all_of:
                return f"there is no {what} {name!r} (there are {', '.join(sorted(all_of))})"
    return None


TRANSFORMS = Registry(
    "transform",
    "transforms",
    {
        "awq": "quantcli.transforms.awq:AWQ",
        "smoothquant": "quantcli.transforms.smoothquant:SMOOTHQUANT",
        "rotate": "quantcli.transforms.rotate:ROTATE",
        "reorder": "quantcli.transforms.reorder:REORDER",
    },
    _lack,
)
"""`Transform` objects; reorder also comes with awq before groups that share a scale."""
