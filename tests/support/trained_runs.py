"""A run that quantizes a model and trains it end to end, in one call, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantcli.artifacts.gguf_file import add_metadata, prepare_gguf, take_encoded
from quantcli.artifacts.write import write_artifact
from quantcli.layerwise.texts import Text
from quantcli.model import Model
from quantcli.plan.recipe import Recipe
from quantcli.rounding.options import Options
from quantcli.rounding.trained import TrainingGain
from quantcli.run.calibrated_run import begin_rounding, prepare_run, round_tensors
from quantcli.statistics.layer_hessians import HELD_OUT
from quantcli.types import Event, Note, Progress

TEXT = (Path(__file__).parents[1] / "data" / "pride-and-prejudice.txt").read_text()


@dataclass
class Run:
    """One run's output, its events, the windows that it saw, and the gain of training."""

    path: Path
    events: list[Event]
    ids: Any
    gain: TrainingGain | None

    @property
    def notes(self) -> list[Note]:
        return [event for event in self.events if isinstance(event, Note)]

    @property
    def tensors(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in gguf.GGUFReader(self.path).tensors}

    @property
    def held_out(self) -> Any:
        return self.ids[HELD_OUT - 1 :: HELD_OUT].astype(np.int64)


def train(
    model: Model, path: Path, *, file_type: str = "Q2_K", resume: bool = False, stop: int = 0,
    ctx: int = 64, **options: Any,
) -> Run:  # fmt: skip
    """Quantize; with ``stop`` the run ends at that step of training, as by an interrupt."""
    planned = prepare_run(model, [Text("a text", TEXT)], ctx=ctx, chunks=20)
    job = prepare_gguf(model, Recipe(type=file_type), path, importance=planned.importance)
    told = Options(**{"rounder": "nearest", "e2e": True, "e2e_steps": 8, **options})
    encoding = begin_rounding(planned, job.plan, path, told, dtype="float32", resume=resume)
    events = round_tensors(encoding)
    seen, steps = [], 0
    assert isinstance(events, Iterator)
    for event in events:
        seen.append(event)
        steps += isinstance(event, Progress) and event.what == "training end to end"
        if stop and steps == stop:
            break
    else:
        trained = encoding.store.trained
        if trained is not None:
            job = add_metadata(job, trained.gain.keys)
        for _ in write_artifact(take_encoded(job, encoding.store)):
            pass
        encoding.checkpoint.remove()
    del events
    encoding.store.close()
    trained = encoding.store.trained
    return Run(path, seen, planned.windows.ids, trained and trained.gain)
