"""Transforms by name, one on top of the other, before anything is rounded.

A chain such as rotate, awq gives a model whose weights are transformed as they are read, and the
statistics that a calibration of it would measure; any rounder goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from quantcli.errors import PlanError, UsageError
from quantcli.model import Model
from quantcli.statistics.input_statistics import InputStatistics
from quantcli.transforms.base import TRANSFORMS, Transform, TransformFound, TransformOptions
from quantcli.transforms.channel_scales import model_groups
from quantcli.transforms.norm_limits import fit_norms
from quantcli.transforms.output_error import RoundRows
from quantcli.transforms.spec import TransformSpec
from quantcli.transforms.transformed_model import apply_transform
from quantcli.transforms.transformed_statistics import TransformedStatistics
from quantcli.types import Event, Note


@dataclass(frozen=True, slots=True)
class TransformsApplied(Event):
    """All transforms are applied: the model, its statistics, and each spec."""

    model: Model
    measured: InputStatistics | None
    transforms: tuple[TransformSpec, ...]


def needed_statistics(names: Sequence[str]) -> tuple[str, ...]:
    """What a calibration must collect for these transforms, none twice."""
    return tuple(dict.fromkeys(need for name in names for need in TRANSFORMS.get(name).needs))


def check_transforms(model: Model, names: Sequence[str]) -> None:
    """Refuse before any work what does not fit the model or each other.

    Raises ArchitectureError for a model that a transform would change or whose fold groups are
    unknown, PlanError for an order in which one transform takes from the next what it needs.
    """
    for number, name in enumerate(names):
        TRANSFORMS.get(name).check(model, names[:number])
    if names:
        model_groups(model)


def transform_model(
    model: Model,
    names: Sequence[str],
    grids: Mapping[str, RoundRows],
    measured: InputStatistics | None,
    options: TransformOptions,
) -> Iterator[Event]:
    """Find each transform on the model as the ones before it leave it.

    ``grids`` holds the tensors that will be rounded; ``measured`` are the untransformed model's
    statistics, None only for transforms that need none. Yields progress, a note on each search,
    and at last `TransformsApplied`.
    """
    check_transforms(model, names)
    specs: list[TransformSpec] = []
    for name in names:
        transform: Transform = TRANSFORMS.get(name)
        if measured is None and transform.needs:
            raise PlanError(
                f"{name} needs a calibration", hint="give a text to calibrate on, or statistics"
            )
        count = len(specs)
        for event in transform.find(model, grids, cast(InputStatistics, measured), options):
            if isinstance(event, TransformFound) and isinstance(event.transform, TransformSpec):
                if event.outcomes:
                    yield _summary(event)
                spec = fit_norms(model, event.transform, options.dtypes)
                specs.append(spec)
                model = apply_transform(model, spec)
                if measured is not None:
                    measured = TransformedStatistics(measured, spec)
            yield event
        if len(specs) == count:
            raise UsageError(
                f"the transform {name!r} ended without a result",
                hint="its `find` must end with TransformFound of quantcli.transforms.base",
            )
    yield TransformsApplied(model, measured, tuple(specs))


def _summary(found: TransformFound) -> Note:
    scaled = sum(bool(outcome.choice) for outcome in found.outcomes)
    before = sum(outcome.before for outcome in found.outcomes)
    after = sum(outcome.after for outcome in found.outcomes)
    ratio = after / before if before > 0 else 1.0
    return Note(
        f"{found.transform.method} scaled {scaled} of {len(found.outcomes)} groups of channels; "
        f"their output error is {ratio:.2f} times what it was"
    )
