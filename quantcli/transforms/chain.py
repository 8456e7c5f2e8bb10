"""Transforms by name, one on top of the other, before anything is rounded.

A chain such as rotate, awq gives a model whose weights are transformed as they are read, and the
statistics that a calibration of it would measure; any rounder goes on from there. What was found
is small (`dump_transform`), so an interrupted run takes it from a file and searches nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from quantcli.archs import find_folds
from quantcli.errors import PlanError
from quantcli.model import Model
from quantcli.statistics.input_statistics import InputStatistics
from quantcli.transforms.awq import awq
from quantcli.transforms.channel_scales import model_groups
from quantcli.transforms.norm_limits import fit_norms
from quantcli.transforms.output_error import RoundRows
from quantcli.transforms.reorder import reorder
from quantcli.transforms.rotate import refuse_rotation, rotate
from quantcli.transforms.scale_search import TransformFound
from quantcli.transforms.smoothquant import smoothquant
from quantcli.transforms.spec import TransformSpec
from quantcli.transforms.transformed_model import apply_transform
from quantcli.transforms.transformed_statistics import TransformedStatistics
from quantcli.types import Event, Note


@dataclass(frozen=True, slots=True)
class Settings:
    """What transforms may be told.

    ``seed`` draws rotations; ``alpha`` is SmoothQuant's, None to search it; ``margin`` is by how
    much a search must lower a group's loss, None for each transform's own; ``weighted`` says that
    rounding will know the columns' importance, ``feedback`` that it will feed errors back,
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
class TransformsApplied(Event):
    """All transforms are found: the model with them, its statistics, and each one by itself."""

    model: Model
    measured: InputStatistics | None
    transforms: tuple[TransformSpec, ...]


Find = Callable[[Model, Mapping[str, RoundRows], InputStatistics, Settings], Iterator[Event]]


@dataclass(frozen=True, slots=True)
class Method:
    """A transform: which statistics it ``needs`` of calibration, and what finds it."""

    needs: tuple[str, ...]
    find: Find


def _awq(
    model: Model, grids: Mapping[str, RoundRows], measured: InputStatistics, settings: Settings
) -> Iterator[Event]:
    return awq(
        model, grids, measured,
        weighted=settings.weighted, feedback=settings.feedback, margin=settings.margin,
        threads=settings.threads,
    )  # fmt: skip


def _reorder(
    model: Model, grids: Mapping[str, RoundRows], measured: InputStatistics, settings: Settings
) -> Iterator[Event]:
    return reorder(
        model, grids, measured,
        weighted=settings.weighted, feedback=settings.feedback, threads=settings.threads,
    )  # fmt: skip


def _smoothquant(
    model: Model, grids: Mapping[str, RoundRows], measured: InputStatistics, settings: Settings
) -> Iterator[Event]:
    return smoothquant(
        model, grids, measured,
        alpha=settings.alpha, margin=settings.margin, threads=settings.threads,
    )  # fmt: skip


def _rotate(
    model: Model, grids: Mapping[str, RoundRows], measured: InputStatistics, settings: Settings
) -> Iterator[Event]:
    yield TransformFound(rotate(model, seed=settings.seed))


TRANSFORMS: Mapping[str, Method] = {
    "awq": Method(("hessian",), _awq),
    "smoothquant": Method(("hessian", "abs_max"), _smoothquant),
    "rotate": Method((), _rotate),
    "reorder": Method(("hessian",), _reorder),
}
"""By the name that a user gives, but for reorder, which comes with awq."""


def needed_statistics(names: Sequence[str]) -> tuple[str, ...]:
    """What a calibration must collect for these transforms, none twice."""
    return tuple(dict.fromkeys(need for name in names for need in TRANSFORMS[name].needs))


def check_transforms(model: Model, names: Sequence[str]) -> None:
    """Refuse before any work what does not fit the model or each other.

    Raises ArchitectureError for a model that a transform would change, PlanError for an order in
    which one transform takes from the next what it needs.
    """
    for number, name in enumerate(names):
        if name == "rotate":
            refuse_rotation(model, find_folds(model.arch))
        if name == "smoothquant" and "rotate" in names[:number]:
            raise PlanError(
                "smoothquant after rotate finds no outlier channels, and cannot know the largest "
                "inputs, which a rotation mixes",
                hint="one of the two, or smoothquant first",
            )
    if names:
        model_groups(model)


def transform_model(
    model: Model,
    names: Sequence[str],
    grids: Mapping[str, RoundRows],
    measured: InputStatistics | None,
    settings: Settings,
) -> Iterator[Event]:
    """Find each transform on the model as the ones before it leave it.

    ``grids`` holds the tensors that will be rounded; ``measured`` are the untransformed model's
    statistics, which only rotate does without. Yields progress, a note on each search, and at
    last `TransformsApplied`.
    """
    check_transforms(model, names)
    if settings.groups and "awq" in names:
        # Of columns that share a scale those of one size: after it, scales have less to do.
        place = names.index("awq")
        names = [*names[:place], "reorder", *names[place:]]
    found: list[TransformSpec] = []
    for name in names:
        method = TRANSFORMS[name]
        if measured is None and method.needs:
            raise PlanError(
                f"{name} needs a calibration", hint="give a text to calibrate on, or statistics"
            )
        transform = None
        for event in method.find(model, grids, measured, settings):  # type: ignore[arg-type]
            if isinstance(event, TransformFound):
                transform = event.transform
                if event.outcomes:
                    yield _summary(name, event)
            yield event
        assert transform is not None
        transform = fit_norms(model, transform, settings.dtypes)
        found.append(transform)
        model = apply_transform(model, transform)
        if measured is not None:
            measured = TransformedStatistics(measured, transform)
    yield TransformsApplied(model, measured, tuple(found))


def _summary(name: str, found: TransformFound) -> Note:
    scaled = sum(bool(outcome.choice) for outcome in found.outcomes)
    before = sum(outcome.before for outcome in found.outcomes)
    after = sum(outcome.after for outcome in found.outcomes)
    ratio = after / before if before > 0 else 1.0
    return Note(
        f"{name} scaled {scaled} of {len(found.outcomes)} groups of channels; their output error "
        f"is {ratio:.2f} times what it was"
    )
