"""Statistics of a model's inputs: measured by a real calibration, or made up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantcli.model import Model
from quantcli.statistics.statistics_file import StatisticsFile

TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"


@contextmanager
def calibrated(
    model: Model, output: Path, *, ctx: int = 64, chunks: int = 6
) -> Iterator[StatisticsFile]:
    """Every statistic of ``model``, which may be transformed, over the start of a text."""
    from quantcli.calibration import execute, prepare
    from quantcli.layerwise.texts import read_texts
    from quantcli.statistics.importance_file import stats_path

    job = prepare(
        model, read_texts([str(TEXT)]), output, ctx=ctx, chunks=chunks, dtype="float32",
        collect=("hessian", "abs_max", "mean_abs"),
    )  # fmt: skip
    for _ in execute(job):
        pass
    with StatisticsFile(stats_path(output)) as found:
        yield found


class Drawn:
    """Made-up inputs: correlated, with channels of very different size."""

    def __init__(self, columns: dict[str, int], seed: int = 0, tokens: int = 300) -> None:
        draws = np.random.default_rng(seed)
        self._inputs: dict[int, NDArray[np.float64]] = {}
        self._columns = columns
        for size in sorted(set(columns.values())):
            mixed = draws.standard_normal((tokens, size)) @ draws.standard_normal((size, size))
            self._inputs[size] = mixed * np.exp(draws.standard_normal(size)) / np.sqrt(size)

    def inputs(self, name: str) -> NDArray[np.float64]:
        return self._inputs[self._columns[name]]

    def count(self, name: str, matrix: int = 0) -> int:
        return len(self.inputs(name))

    def hessian(self, name: str, matrix: int = 0) -> NDArray[np.float32]:
        rows = self.inputs(name)
        return (rows.T @ rows / len(rows)).astype(np.float32)

    def abs_max(self, name: str, matrix: int = 0) -> NDArray[np.float32]:
        return np.abs(self.inputs(name)).max(axis=0).astype(np.float32)

    def mean_abs(self, name: str, matrix: int = 0) -> NDArray[np.float32]:
        return np.abs(self.inputs(name)).mean(axis=0).astype(np.float32)
