"""Statistics of a model's inputs on a run's texts, measured once for all that ask for the same.

They lie in a folder next to the output until all is made; nothing in them is random, so that an
interrupted run measures the same again. Ranks measure together and all read what the first wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from quantcli.artifacts.staging import remove_own
from quantcli.calibration import CalibrationDone, execute, prepare
from quantcli.events import Events, take
from quantcli.layerwise.ranked_run import begin_folder, leads, wait_until_seen
from quantcli.model import Model
from quantcli.run.calibrated_run import CalibratedRun


class TextStatistics:
    """Calibrations in ``folder``, by model and what they collect."""

    def __init__(
        self, folder: Path, *, max_memory: int, threads: int, device: str | None = None
    ) -> None:
        self._folder = folder
        self._device = device
        self._max_memory = max_memory
        self._threads = threads
        self._found: list[tuple[Model, tuple[str, ...], Path]] = []

    def measure(self, run: CalibratedRun, needs: Sequence[str]) -> Events[Path]:
        """The importance matrix of ``run``'s texts; what ``needs`` names lies beside it."""
        for model, collected, path in self._found:
            if model is run.model and collected == tuple(needs):
                return path
        if not self._found:
            begin_folder(self._folder, empty=True)
        path, cut = self._folder / f"inputs-{len(self._found)}.gguf", run.cut
        job = prepare(
            run.model, cut.texts, path, ctx=cut.ctx, chunks=cut.chunks, seed=cut.seed,
            collect=needs, max_memory=self._max_memory, threads=self._threads,
            device=self._device,
        )  # fmt: skip
        yield from take(execute(job), CalibrationDone)
        wait_until_seen(path)
        self._found.append((run.model, tuple(needs), path))
        return path


@contextmanager
def text_statistics(
    output: Path, *, max_memory: int, threads: int, device: str | None = None
) -> Iterator[TextStatistics]:
    """A folder for them next to ``output``, which is gone afterwards."""
    folder = output.with_name(f".{output.name}.statistics")
    try:
        yield TextStatistics(folder, max_memory=max_memory, threads=threads, device=device)
    finally:
        if leads():
            remove_own(folder)
