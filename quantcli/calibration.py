"""A calibration from texts to files: what `calibrate` and `quantize --calibrate` both do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.atomic import refuse_existing, refuse_own
from quantcli.artifacts.scratch_place import check_scratch, work_path
from quantcli.errors import SourceError
from quantcli.layerwise.checkpoint import Checkpoint, checkpoint_folder
from quantcli.layerwise.devices import choose_device, remark
from quantcli.layerwise.model_run import ModelRun, choose_dtype
from quantcli.layerwise.ranked_run import begin_checkpoint, share_windows
from quantcli.layerwise.texts import Text
from quantcli.layerwise.walk import open_walk
from quantcli.layerwise.windows import cut_windows
from quantcli.model import Model
from quantcli.sources.imatrix import read_sums
from quantcli.statistics.checkpoint_statistics import CheckpointStatistics
from quantcli.statistics.importance_file import Calibration, output_paths, stats_path, write
from quantcli.statistics.input_statistics import check_needs
from quantcli.statistics.input_visitor import InputVisitor
from quantcli.statistics.layer_statistics import LayerStatistics
from quantcli.statistics.statistics_file import (
    MergedStatistics,
    StatisticsFile,
    StatisticsSource,
)
from quantcli.types import Event, Note


@dataclass(frozen=True, slots=True)
class CalibrationDone(Event):
    """The files are whole."""

    paths: tuple[Path, ...]
    calibration: Calibration


@dataclass(frozen=True)
class CalibrationJob:
    """A decided calibration: the texts are cut and the output's place is free."""

    run: ModelRun
    needs: tuple[str, ...]
    checkpoint: Checkpoint
    output: Path
    legacy: bool
    force: bool


def prepare(
    model: Model,
    texts: Sequence[Text],
    output: Path,
    *,
    ctx: int = 512,
    chunks: int | None = None,
    seed: int | None = None,
    collect: Sequence[str] = (),
    dtype: str | None = None,
    device: str | None = None,
    max_memory: int = 1 << 62,
    threads: int = 1,
    legacy: bool = False,
    resume: bool = False,
    force: bool = False,
    scratch: Path | None = None,
    dry_run: bool = False,
) -> CalibrationJob:
    """Decide everything about calibrating ``model``; no weight is read.

    ``max_memory`` is in bytes, for hidden states; ``scratch`` is the folder for the run's files.
    With ``dry_run`` nothing is made. Raises UsageError, SourceError or OutputError.
    """
    if model.from_gguf:
        raise SourceError(
            f"{model.path} is a GGUF; transformers runs checkpoints",
            hint="give the checkpoint that it was made from",
        )
    needs = check_needs(collect)
    refuse_own(output_paths(output, needs), {info.file for info in model.store.tensors.values()})
    refuse_existing(output_paths(output, needs), force=force or resume or dry_run)
    if scratch is not None:
        check_scratch(scratch)
    windows = cut_windows(model, texts, ctx, chunks, seed)
    device = choose_device(device)
    folder = checkpoint_folder(work_path(output, scratch))
    run = ModelRun(
        model, windows, folder, choose_dtype(dtype, device, model), device, max_memory, threads
    )
    run = share_windows(run)
    checkpoint = Checkpoint(folder, {**run.identity, "choice of statistics": list(needs)})
    if not dry_run:
        begin_checkpoint(checkpoint, run, resume=resume, force=force)
    return CalibrationJob(run, needs, checkpoint, output, legacy, force or resume)


def execute(job: CalibrationJob) -> Iterator[Event]:
    """Run the model and write the files, yielding notes and progress, at last `CalibrationDone`.

    An interrupt leaves the checkpoint, so that ``resume`` can go on from the last whole layer.
    """
    run, checkpoint = job.run, job.checkpoint
    count, available = len(run.windows.ids), run.windows.available
    yield Note(
        f"{count} windows of {run.windows.ids.shape[1]} tokens from "
        f"{' and '.join(run.windows.labels)}, products in {run.dtype} on {run.device}"
        + (f" ({available} were there)" if available > count else "")
    )
    lack = remark(run.device)
    if lack is not None:
        yield Note(lack, "warning")
    yield from (Note(said, "warning") for said in run.windows.remarks)
    if run.model.untabled is not None:
        yield Note(run.model.untabled.remark)
    if checkpoint.done:
        yield Note(f"continuing after layer {checkpoint.done - 1}")
    yield from _collect(job)
    layers = checkpoint.done + 1
    calibration = _gather(run, checkpoint, layers)
    further = CheckpointStatistics(checkpoint, layers, job.needs) if len(job.needs) > 1 else None
    if run.model.mtp_tensors:
        unseen = sum(len(tensor.shape) > 1 for tensor in run.model.mtp_tensors)
        yield Note(
            f"nothing is known of the {unseen} matrices of multi-token prediction, because "
            "transformers does not run them"
        )
    if run.ranks is None:
        paths = write(job.output, calibration, legacy=job.legacy, further=further, force=job.force)
        checkpoint.remove()
    else:
        group = run.ranks.group
        paths = output_paths(job.output, job.needs)
        # All have read the layers.
        group.wait()
        if group.index == 0:
            write(job.output, calibration, legacy=job.legacy, further=further, force=job.force)
            checkpoint.remove()
        group.wait()
    yield CalibrationDone(tuple(paths), calibration)


def load(path: Path) -> Calibration:
    """A finished calibration, quantcli's or llama-imatrix's, in the GGUF form."""
    found = read_sums(path)
    squares = {name: sums.astype(np.float64) for name, (sums, _) in found.entries.items()}
    counts = {name: count.astype(np.int64) for name, (_, count) in found.entries.items()}
    return Calibration(squares, counts, found.datasets, found.chunks, found.chunk_size)


def merge(
    paths: Sequence[Path], output: Path, *, legacy: bool = False, force: bool = False
) -> Iterator[Event]:
    """Add up finished calibrations of one model; the order does not matter.

    Their further statistics are added up too when every one has them.
    """
    parts = [load(path) for path in paths]
    files = [stats_path(path) for path in paths]
    with ExitStack() as stack:
        further: StatisticsSource | None = None
        if all(path.exists() for path in files):
            further = MergedStatistics(
                [stack.enter_context(StatisticsFile(path)) for path in files]
            )
        elif any(path.exists() for path in files):
            lacking = next(path for path in files if not path.exists())
            yield Note(f"only the importance is merged, since there is no {lacking}", "warning")
        calibration = _add(parts, paths)
        written = write(output, calibration, legacy=legacy, further=further, force=force)
    yield CalibrationDone(tuple(written), calibration)


def _collect(job: CalibrationJob) -> Iterator[Event]:
    run = job.run
    memory = run.max_memory
    with open_walk(run, run.model, run.folder, job.checkpoint, max_memory=memory) as walk:
        if not walk.states.in_memory:
            size = walk.states.nbytes / 1e9
            yield Note(f"hidden states ({size:.1f} GB) are kept in a file at {run.folder}")
        yield from walk.run(InputVisitor(walk, job.needs, job.checkpoint, run))


def _gather(run: ModelRun, checkpoint: Checkpoint, layers: int) -> Calibration:
    squares: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, NDArray[np.int64]] = {}
    for layer in range(layers):
        with checkpoint.read(layer) as file:
            for name, entry in LayerStatistics(file).entries().items():
                if name in squares:
                    # Layers may share weights, as Zamba's do.
                    squares[name] = squares[name] + entry.squares
                    counts[name] = counts[name] + entry.counts
                else:
                    squares[name], counts[name] = entry.squares, entry.counts
    count, size = run.windows.ids.shape
    return Calibration(squares, counts, run.windows.labels, count, size)


def _add(parts: Sequence[Calibration], paths: Sequence[Path]) -> Calibration:
    first = parts[0]
    squares, counts = dict(first.squares), dict(first.counts)
    for part, path in zip(parts[1:], paths[1:], strict=True):
        if part.chunk_size != first.chunk_size:
            raise SourceError(
                f"{path} has windows of {part.chunk_size} tokens, {paths[0]} of {first.chunk_size}",
                hint="calibrate with the same --ctx",
            )
        for name, value in part.squares.items():
            if name not in squares:
                squares[name], counts[name] = value, part.counts[name]
                continue
            if squares[name].shape != value.shape:
                raise SourceError(
                    f"{path}: entry {name!r} has shape {value.shape}, but {squares[name].shape} in "
                    f"{paths[0]}",
                    hint="they are of different models",
                )
            squares[name] = squares[name] + value
            counts[name] = counts[name] + part.counts[name]
    datasets = tuple(label for part in parts for label in part.datasets)
    return Calibration(
        squares, counts, datasets, sum(part.chunks for part in parts), first.chunk_size
    )
