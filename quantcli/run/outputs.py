"""One output of a quantization: as it is planned, and as it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from quantcli.statistics.input_statistics import CACHE, HISTOGRAM, MEAN, MIN_MAX
from quantcli.types import Event

if TYPE_CHECKING:
    from quantcli.artifacts.gguf_file import GgufFile
    from quantcli.artifacts.model_folder import ModelFolder
    from quantcli.plan.allocate import Costs
    from quantcli.plan.needs import Forecast
    from quantcli.rounding.options import Outcome
    from quantcli.rounding.run_store import EncodedStore
    from quantcli.run.calibrated_run import CalibratedRun


def needs_text(artifact: GgufFile | ModelFolder) -> TypeGuard[ModelFolder]:
    """Whether it is a folder with scales that are found on texts."""
    return bool(getattr(artifact.plan, "needs_text", False))


def needed_statistics(artifact: GgufFile | ModelFolder) -> tuple[str, ...]:
    """What a calibration must collect for these scales, and for corrections of biases."""
    if artifact.plan.recipe.correct_bias:
        return (MEAN,)
    if not needs_text(artifact):
        return ()
    items = artifact.plan.static_items
    inputs: tuple[str, ...] = (MIN_MAX,) if items else ()
    if any(item.scheme.narrows_inputs for item in items if item.scheme is not None):
        inputs = (*inputs, HISTOGRAM)
    return (*inputs, CACHE) if artifact.plan.caches else inputs


@dataclass(frozen=True)
class Quantized:
    """One output: written, or planned where ``digest`` is None.

    ``threads`` write it; it was whole ``seconds`` after the run began. ``outcomes`` are those of
    the tensors that a method rounded, ``training`` says what training end to end changed.
    ``kept``: an interrupted run of the same set had made it. ``forecast`` is what was expected of
    the run that makes it.
    """

    artifact: GgufFile | ModelFolder
    threads: int
    digest: str | None = None
    seconds: float = 0.0
    outcomes: tuple[Outcome, ...] = ()
    training: dict[str, object] | None = None
    kept: bool = False
    forecast: Forecast | None = None

    @property
    def is_tower(self) -> bool:
        """Whether it is a vision or audio tower."""
        return self.artifact.plan.recipe.mmproj_only


@dataclass(frozen=True, slots=True)
class OutputDone(Event):
    """An output is whole, under its name."""

    output: Quantized


@dataclass(frozen=True, slots=True)
class KindsChosen(Event):
    """The type, or scheme, of each tensor of an output that had a choice, and what all would cost.

    ``costs`` are KL divergences in nats, by tensor and kind.
    """

    paths: tuple[Path, ...]
    noun: str
    kinds: Mapping[str, str]
    costs: Costs


@dataclass(frozen=True)
class Planned:
    """An output before its weights are written.

    ``run`` is how its methods run the model, ``store`` holds the tensors that they chose. Of one
    that is whole already, ``kept`` is the digest of its source. ``forecast`` is what the run that
    makes it will need.
    """

    artifact: GgufFile | ModelFolder
    path: Path
    threads: int
    run: CalibratedRun | None = None
    store: EncodedStore | None = None
    kept: str | None = None
    forecast: Forecast | None = None
    states_in_memory: bool = True
    """Whether hidden states may stay in memory; else they are in a file, whatever their size."""
    in_place: bool = False
    """Whether what a method rounds goes to its place in the output's files at once."""

    @property
    def is_tower(self) -> bool:
        """Whether it is a vision or audio tower, which no text runs through."""
        return self.artifact.plan.recipe.mmproj_only
