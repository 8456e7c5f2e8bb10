"""A calibrated quantization from a plan and texts to encoded tensors: what ``--method`` does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quantcli.artifacts.held_output import HeldOutput
from quantcli.artifacts.staging import held_path, remove_own
from quantcli.errors import PlanError, SourceError, UsageError
from quantcli.events import Events
from quantcli.layerwise.checkpoint import Checkpoint, checkpoint_folder, was_interrupted
from quantcli.layerwise.devices import choose_device, remark
from quantcli.layerwise.model_run import ModelRun, choose_dtype
from quantcli.layerwise.random_windows import add_random, random_windows
from quantcli.layerwise.ranked_run import begin_checkpoint, share_windows
from quantcli.layerwise.texts import Text
from quantcli.layerwise.windows import Windows, cut_windows
from quantcli.model import Model
from quantcli.plan.folders import FolderPlan
from quantcli.plan.names import EMBEDDING_NAME, HEAD_NAME
from quantcli.plan.planner import Plan
from quantcli.plan.recipe import usual
from quantcli.rounding.codecs import find_codecs, keeps_groups
from quantcli.rounding.options import Options, Outcome
from quantcli.rounding.run_store import EncodedStore
from quantcli.run.layer_rounding import round_model
from quantcli.run.rounding_task import RoundedOutput, RoundingTask
from quantcli.sources.imatrix import Importance
from quantcli.statistics.layer_gradients import choose_windows, count_windows
from quantcli.types import Note


@dataclass(frozen=True)
class TextWindows:
    """The texts, and how windows are cut from them."""

    texts: Sequence[Text]
    ctx: int
    chunks: int | None
    seed: int | None


@dataclass(frozen=True)
class CalibratedRun:
    """A decided run; ``importance`` has the shapes of what it will measure, for the plan."""

    model: Model
    windows: Windows
    importance: Importance
    cut: TextWindows
    random_windows: int = 0
    samples: int = 0
    """The last windows, which the model itself writes."""
    written: bool = True
    """Whether it has; before, they are empty."""

    def with_model(self, model: Model) -> CalibratedRun:
        """The same run of a transformed model."""
        return replace(self, model=model, importance=expected_importance(model, self.windows))


def prepare_run(
    model: Model, texts: Sequence[Text], *, ctx: int = 512, chunks: int | None = None,
    seed: int | None = None, random_share: float = usual("random_share"),
    sample_share: float = usual("sample_share"),
) -> CalibratedRun:  # fmt: skip
    """Cut the texts, and add windows of random tokens and room for samples; no weight is read.

    `quantcli.run.write_samples` fills the room. SourceError for a GGUF, which transformers cannot
    run.
    """
    _refuse_gguf(model)
    if not 0 <= random_share < 1:
        raise UsageError(f"a share of {random_share:g} random windows is not from 0 to below 1")
    if not 0 <= sample_share < 1 - random_share:
        raise UsageError(
            f"a share of {sample_share:g} samples and {random_share:g} random windows leaves no "
            "text",
            hint="both together are less than 1",
        )
    text = cut_windows(model, texts, ctx, chunks, seed)
    windows = add_random(text, model, random_share, sample_share)
    drawn = len(windows.ids) - len(text.ids)
    samples = round(len(text.ids) * sample_share / (1 - random_share - sample_share))
    if samples:
        room = np.zeros((samples, windows.ids.shape[1]), np.int32)
        windows = replace(windows, ids=np.concatenate([windows.ids, room]))
    return CalibratedRun(
        model, windows, expected_importance(model, windows), TextWindows(texts, ctx, chunks, seed),
        drawn, samples, not samples,
    )  # fmt: skip


def prepare_random_run(model: Model, count: int) -> CalibratedRun:
    """A run on ``count`` windows of random tokens; errors as of `prepare_run`."""
    _refuse_gguf(model)
    windows = random_windows(model, count)
    cut = TextWindows((), windows.ids.shape[1], None, None)
    return CalibratedRun(model, windows, expected_importance(model, windows), cut, count)


def _refuse_gguf(model: Model) -> None:
    if model.from_gguf:
        raise SourceError(
            f"{model.path} is a GGUF; a method runs the model, and transformers runs checkpoints",
            hint="give the checkpoint that it was made from",
        )


def expected_importance(model: Model, windows: Windows | None = None) -> Importance:
    """An importance matrix of the right shapes: weights in layers, the embedding and the head.

    Not of multi-token prediction, which is not run.
    """
    entries = {}
    unseen = {tensor.name for tensor in model.mtp_tensors}
    for tensor in model.tensors:
        inside = tensor.name.startswith("blk.") and tensor.name.endswith(".weight")
        if tensor.name in unseen:
            continue
        if len(tensor.shape) > 1 and (inside or tensor.name in (EMBEDDING_NAME, HEAD_NAME)):
            matrices = tensor.matrices
            ones = np.broadcast_to(np.float32(1), (matrices, tensor.columns))
            entries[tensor.name] = ones
    labels, count = (windows.labels, len(windows.ids)) if windows else ((), 0)
    return Importance(Path(), entries, labels, count)


def costs_folder(output: Path) -> Path:
    """Where the choice of types keeps its work until the file is whole."""
    folder = checkpoint_folder(output)
    return folder.with_name(folder.name + "-survey")


def remove_costs(output: Path) -> None:
    """The choice of types is not needed again."""
    remove_own(costs_folder(output))


def remove_run(output: Path, files: Iterable[Path]) -> None:
    """Nothing of an earlier run at ``output`` that made the ``files`` is needed again."""
    remove_own(checkpoint_folder(output))
    remove_costs(output)
    for file in files:
        remove_own(held_path(file))


@dataclass(frozen=True)
class Rounding:
    """A rounding that may begin: `round_tensors` does it, then the stores hold the tensors.

    ``stores`` are those of its outputs in turn, of which ``output`` is the first one's path. It
    ends with `finish` or `abandon`.
    """

    work: RoundingTask
    checkpoint: Checkpoint
    output: Path
    labels: tuple[str, ...]
    random_windows: int = 0
    samples: int = 0
    notes: tuple[Note, ...] = ()
    held: tuple[HeldOutput, ...] = ()

    @property
    def stores(self) -> tuple[EncodedStore, ...]:
        """What was rounded for each output."""
        return tuple(output.store for output in self.work.outputs)

    @property
    def store(self) -> EncodedStore:
        """What was rounded for the only output."""
        (store,) = self.stores
        return store

    def finish(self) -> None:
        """The outputs are whole: the run's folders go."""
        self._close()
        self._remove()

    def _close(self) -> None:
        for store in self.stores:
            store.close()

    def _remove(self) -> None:
        # The checkpoint tells of the others, so it goes last.
        for held in self.held:
            held.remove()
        remove_costs(self.output)
        self.checkpoint.remove()

    def abandon(self) -> list[Note]:
        """Keep the layers that are done, and say where; without any the folders go."""
        self._close()
        if not self.checkpoint.done:
            self._remove()
            return []
        sentence = f"{self.checkpoint.progress}; the same command with --resume continues"
        return [Note(sentence, "warning")]


def begin_rounding(
    job: CalibratedRun, plans: Plan | FolderPlan | Sequence[Plan | FolderPlan], output: Path,
    options: Options, *, dtype: str | None = None, device: str | None = None,
    max_memory: int = 1 << 62, threads: int = 1, resume: bool = False, force: bool = False,
    gradients: Path | None = None, held: Sequence[HeldOutput | None] = (),
) -> Rounding:  # fmt: skip
    """Open the folder of a run that rounds for one or several plans, next to the first ``output``.

    What is rounded for each goes into the one of ``held`` at once, where there is one. UsageError,
    SourceError or OutputError. Several do not go with ``options.propagate``.
    """
    options.check()
    asked = [plans] if isinstance(plans, Plan | FolderPlan) else list(plans)
    codecs = [find_codecs(plan, job.model) for plan in asked]
    for plan, (rounded, _) in zip(asked, codecs, strict=True):
        if not rounded:
            raise PlanError(
                f"{plan.label} quantizes nothing that a method could round",
                hint="leave --method out, or choose another type",
            )
    folder = checkpoint_folder(output)
    if dtype is None and (options.propagate or options.trainer or options.e2e):
        # What a quantized prefix or a code changes would drown in bfloat16's rounding.
        dtype = "float32"
    run = plan_passes(job, folder, dtype, device, max_memory, threads)
    gradients_of = count_windows(options.fisher_windows, [t.name for t in job.model.tensors])
    run = share_windows(run, choose_windows(len(run.windows.ids), gradients_of))
    places = [folder] if len(asked) == 1 else [folder / str(i) for i in range(len(asked))]
    into = list(held) or [None] * len(asked)
    outputs = []
    for (rounded, every), place, its in zip(codecs, places, into, strict=True):
        store = EncodedStore(place, None if its is None or its.whole else its)
        layout = "" if its is None else its.identity
        outputs.append(RoundedOutput(rounded, every, store, layout))
    work = RoundingTask(run, tuple(outputs), options, gradients or run.folder)
    checkpoint = Checkpoint(folder, work.identity)
    goes_on = resume and was_interrupted(output)
    begin_checkpoint(checkpoint, run, resume=resume, force=force)
    for its in (output.store.held for output in outputs):
        if its is None:
            continue
        if goes_on:
            its.take_up()
            continue
        try:
            its.create()
        except BaseException:
            checkpoint.remove()
            raise
    for place in places:
        place.mkdir(exist_ok=True)
    folders = [plan for plan in asked if isinstance(plan, FolderPlan)]
    notes = tuple(dict.fromkeys(note for plan in folders for note in _group_notes(plan)))
    labels = tuple(plan.label for plan in asked)
    return Rounding(
        work, checkpoint, output, labels, job.random_windows, job.samples, notes,
        tuple(its for its in into if its is not None),
    )  # fmt: skip


def _group_notes(plan: FolderPlan) -> tuple[Note, ...]:
    """A remark on matrices that no method rounds, because GGUF has their columns by turns."""
    left = [
        item.matrix
        for item in plan.items
        if item.scheme is not None and not keeps_groups(item.matrix, item.scheme.grid)
    ]
    if not left:
        return ()
    return (
        Note(
            f"{len(left)} matrices such as {left[0].module} are rounded to nearest: columns that "
            f"share a scale lie across the heads that they read, which llama.cpp has by turns",
            "warning",
        ),
    )


def plan_passes(
    job: CalibratedRun, folder: Path, dtype: str | None, device: str | None, max_memory: int,
    threads: int,
) -> ModelRun:  # fmt: skip
    """How the model will be run; ``folder`` takes what is too large for memory."""
    if not job.written:
        raise ValueError("the model's samples are not written")
    device = choose_device(device)
    return ModelRun(
        job.model, job.windows, folder,
        choose_dtype(dtype, device, job.model), device, max_memory, threads,
    )  # fmt: skip


def round_tensors(rounding: Rounding) -> Events[None]:
    """Run the model and round its tensors, yielding notes, progress and an `Outcome` for each.

    An interrupt leaves the folder, so that ``resume`` can go on from the last whole layer.
    """
    run = rounding.work.run
    drawn = rounding.random_windows
    samples, available = rounding.samples, run.windows.available
    count = len(run.windows.ids) - drawn - samples
    yield Note(
        f"{count} windows of {run.windows.ids.shape[1]} tokens from "
        f"{' and '.join(run.windows.labels)}"
        + (f" ({available} were there)" if available > count else "")
        + (f" and {drawn} of random tokens" if drawn else "")
        + (f" and {samples} that the model wrote" if samples else "")
        + f", products in {run.dtype} on {run.device}"
    )
    lack = remark(run.device)
    if lack is not None:
        yield Note(lack, "warning")
    yield from (Note(said, "warning") for said in run.windows.remarks)
    yield from rounding.notes
    if rounding.checkpoint.done:
        yield Note(f"continuing after layer {rounding.checkpoint.done - 1}")
    yield from round_model(rounding.work, rounding.checkpoint)
    for output in rounding.work.outputs:
        missing = [name for name in output.codecs if name not in output.store]
        if missing:
            raise SourceError(
                f"the model never multiplied with {missing[0]}, so no method can round it",
                hint="leave --method out",
            )
    several = len(rounding.labels) > 1
    for label, store in zip(rounding.labels, rounding.stores, strict=True):
        yield _summary(store.outcomes, f"{label}: " if several else "")


def _summary(outcomes: Sequence[Outcome], label: str) -> Note:
    kept = sum(outcome.kept for outcome in outcomes)
    matrices = sum(outcome.matrices for outcome in outcomes)
    ratios = [o.after / o.before for o in outcomes if o.before > 0]
    ratio = float(np.exp(np.mean(np.log(np.maximum(ratios, 1e-9))))) if ratios else 1.0
    return Note(
        f"{label}{matrices} matrices rounded; on held-out text their output error is {ratio:.2f} "
        "times that of importance weights alone"
        + (f"; {kept} kept the latter, being no worse" if kept else "")
    )
