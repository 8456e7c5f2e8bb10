"""Runs a calibration of a folder, whole or broken off in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantcli.types import Progress

TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"


def run(folder: Path, output: Path, *, stop_in: str | None = None, **options: Any) -> Any:
    """The calibration; None when it was broken off as soon as ``stop_in`` was at work."""
    from quantcli.calibration import CalibrationDone, execute, prepare
    from quantcli.layerwise.texts import read_texts
    from quantcli.model import open_model

    texts = read_texts(options.pop("data", [str(TEXT)]))
    with open_model(folder, table=False) as model:
        job = prepare(model, texts, output, **{"ctx": 64, "chunks": 6, "threads": 1} | options)
        for event in execute(job):
            if isinstance(event, Progress) and event.what == stop_in:
                return None
            if isinstance(event, CalibrationDone):
                return event.calibration
    raise AssertionError("no result")
