"""Models on texts: the one loop of evaluation.

Window by window, the base first, then each model on the same window, in blocks of positions: the
logits of two blocks at most are held, and of what was scored a few numbers for each position
remain. Several
models run side by side against one run of the base when their weights fit into memory together,
otherwise one after the other, each with a run of the base of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from quantcli.artifacts.atomic import refuse_existing
from quantcli.errors import SourceError, UsageError
from quantcli.evals.agreement import Loaded, common_tokens
from quantcli.evals.artifacts import EvaluatedModel
from quantcli.evals.bases.file import BaseFile, BaseHeader, BaseWriter
from quantcli.evals.greedy import Continuation, Greedy, continue_windows, follow
from quantcli.evals.memory import available
from quantcli.evals.scores import Base, Floats, Ids, LogitsBase, losses, row_blocks
from quantcli.evals.summary import Summary, Tally, join_tallies
from quantcli.evals.windows import Tokens, Window, check_lengths, cut
from quantcli.layerwise.require_torch import require_torch
from quantcli.layerwise.texts import Text
from quantcli.ranks.joined import active_group
from quantcli.types import Event, Note, Progress

CONTEXT = 512


@dataclass(frozen=True)
class EvaluationJob:
    """What is to be measured. ``kept``: tokens of a compact base row, None for llama.cpp's rows.

    Without texts, those of ``base`` are run. ``context`` None means the base's, or `CONTEXT`.
    ``device`` is torch's, None for the best there is.
    """

    artifacts: Sequence[EvaluatedModel]
    texts: Sequence[Text] = ()
    context: int | None = None
    stride: int | None = None
    chunks: int | None = None
    reference: EvaluatedModel | None = None
    base: BaseFile | None = None
    save: Path | None = None
    kept: int | None = None
    force: bool = False
    threads: int = 1
    device: str | None = None
    greedy: int | None = None
    """Tokens that the reference continues prompts by."""
    floor: EvaluatedModel | None = None
    """The reference in another engine, which shows what the runtimes' rounding does."""

    @property
    def length(self) -> int:
        """Tokens of a window."""
        given = self.base.header.context if self.base else CONTEXT
        return self.context or given

    @property
    def compares(self) -> bool:
        """Whether there is a base."""
        return self.reference is not None or self.base is not None


@dataclass(frozen=True, slots=True)
class EvaluationDone(Event):
    """One model on one text."""

    artifact: EvaluatedModel
    text: str
    windows: int
    summary: Summary
    greedy: Greedy | None = None
    is_floor: bool = False
    """Whether it is the reference once more."""


def check_job(job: EvaluationJob) -> None:
    """UsageError for wishes that exclude one another; SourceError for a base of another context."""
    check_lengths(job.length, job.stride)
    if job.reference is not None and job.base is not None:
        raise UsageError("--reference and --base exclude each other", hint="leave one of them out")
    if not job.texts and job.base is None:
        raise UsageError(
            "there is no text to evaluate on",
            hint="--data names a text that the model was not trained on; --data built-in is for a "
            "first look",
        )
    if job.base is not None and job.base.header.context != job.length:
        raise SourceError(
            f"{job.base.path} was made with a context of {job.base.header.context} tokens, "
            f"not {job.length}",
            hint=f"--ctx {job.base.header.context}",
        )
    if job.save is not None:
        refuse_existing([job.save], force=job.force)
    if job.kept is not None and job.save is None:
        raise UsageError("--top-k belongs to --save-base", hint="name the file to write")
    for option, given in (("--base", job.base), ("--save-base", job.save)):
        if given is not None and (len(job.texts) > 1 or job.stride):
            raise UsageError(
                f"{option} holds one text in windows that do not overlap",
                hint="give one --data and no --stride",
            )
    everyone = [*job.artifacts, *([job.reference] if job.reference else [])]
    if job.device is not None:
        other = next((model for model in everyone if model.engine != "torch"), None)
        if other is not None and job.device != "cpu":
            raise UsageError(
                f"{other.label} runs in {other.engine}, and --device is torch's",
                hint="add --engine torch",
            )
        if other is None:
            require_torch()
            from quantcli.layerwise.devices import choose_device

            choose_device(job.device)
    if job.greedy is not None:
        if job.reference is None:
            raise UsageError("--greedy needs a model that continues texts", hint="add --reference")
        if not 0 < job.greedy <= job.length // 2:
            raise UsageError(
                f"--greedy {job.greedy} is not between 1 and half the window, {job.length // 2}",
                hint="--greedy 64 is usual",
            )
    if job.save is not None and job.reference is None and len(job.artifacts) > 1:
        raise UsageError("--save-base saves one model", hint="name the base alone")


def evaluate(job: EvaluationJob) -> Iterator[Event]:
    """Run everything, yielding an `EvaluationDone` for each model and text."""
    check_job(job)
    yield from _notes(job)
    groups = _groups(job)
    continued: dict[str, list[Continuation]] = {}
    texts: list[Text | None] = [*job.texts] or [None]
    total, done = len(groups) * sum(map(_size, texts)), 0
    for number, group in enumerate(groups):
        # One run of the base is saved, however often it runs.
        job = job if number == 0 else replace(job, save=None)
        with ExitStack() as stack:
            models = [_load(artifact, job, stack) for artifact in group]
            reference = _load(job.reference, job, stack) if job.reference else None
            for text in texts:
                for event in _evaluate_text(job, models, reference, text, continued):
                    if isinstance(event, Progress):
                        event = replace(event, done=done + event.done, total=total)
                    yield event
                done += _size(text)


def _notes(job: EvaluationJob) -> Iterator[Note]:
    yield from (Note(text.remark, "warning") for text in job.texts if text.remark is not None)
    for artifact in (*job.artifacts, *([job.reference] if job.reference else ())):
        longest = artifact.model.count("context_length")
        if 0 < longest < job.length:
            yield Note(
                f"{artifact.label} takes {longest} tokens, and windows have {job.length}: the "
                f"figures say little of it; --ctx {longest} or less",
                "warning",
            )
    base = job.reference
    other = next((a for a in job.artifacts if base and a.engine != base.engine), None)
    if base is not None and other is not None:
        yield Note(
            f"{base.label} runs in {base.engine} and {other.label} in {other.engine}, so the "
            "divergence includes what sets the two apart; --engine torch leaves the weights' alone"
        )


def _groups(job: EvaluationJob) -> list[Sequence[EvaluatedModel]]:
    """Models that are in memory at the same time."""
    everyone = [*job.artifacts, *([job.floor] if job.floor else ())]
    need = sum(artifact.nbytes for artifact in everyone)
    need += job.reference.nbytes if job.reference else 0
    # Twice, since torch holds float32 of what is stored in 16 bits.
    if job.compares and 2 * need <= available() // 2:
        return [everyone]
    return [[artifact] for artifact in everyone]


def _size(text: Text | None) -> int:
    return text.nbytes if text else 1


def _load(artifact: EvaluatedModel, job: EvaluationJob, stack: ExitStack) -> Loaded:
    engine = artifact.load(job.length, job.threads, job.device)
    stack.callback(engine.close)
    return Loaded(artifact, engine)


def _evaluate_text(
    job: EvaluationJob, models: Sequence[Loaded], reference: Loaded | None, text: Text | None,
    continued: dict[str, list[Continuation]],
) -> Iterator[Event]:  # fmt: skip
    everyone = [reference, *models] if reference else models
    tokens = common_tokens(everyone, text, job.base, job.length)
    label = text.label if text else str(job.base.path) if job.base else ""
    begin = everyone[0].engine.begin
    windows = _windows(job, begin, tokens, label)
    tallies = [Tally() for _ in models]
    total, group = len(windows), active_group()
    if group is not None:
        if total < group.count:
            raise UsageError(
                f"{total} windows of text are too few for {group.count} ranks",
                hint="give more text, or start fewer ranks",
            )
        windows = windows[group.index :: group.count]
    with ExitStack() as stack:
        writer = None
        if job.save is not None:
            kept = tokens[: len(windows) * job.length]
            size = everyone[0].engine.vocabulary
            header = BaseHeader(job.length, size, len(windows), kept, job.kept)
            writer = stack.enter_context(BaseWriter(job.save, header, force=job.force))
        runs = [model.engine.run(windows) for model in models]
        bases = reference.engine.run(windows) if reference else None
        stored = stack.enter_context(job.base.reading()) if job.base else None
        for number, window in enumerate(windows, 1):
            for rows in row_blocks(len(window.targets), everyone[0].engine.vocabulary):
                targets = window.targets[rows]
                base: Base | None = stored.read(len(targets)) if stored else None
                saved: Floats | None = None
                if bases is not None:
                    saved = next(bases)
                    base = LogitsBase(saved)
                for run, tally in zip(runs, tallies, strict=True):
                    logits = next(run)
                    _score(logits, targets, base, tally)
                    saved = logits if saved is None else saved
                if writer is not None and saved is not None:
                    writer.add(saved, targets)
            share = _size(text) * number // len(windows)
            yield Progress(share, 0, f"{label}, window {number} of {len(windows)}")
        if writer is not None:
            writer.publish()
    if group is not None:
        tallies = [join_tallies(group.gather(tally)) for tally in tallies]
    if job.greedy is not None and reference is not None and label not in continued:
        yield Progress(_size(text), 0, f"{label}, greedy continuations")
        continued[label] = continue_windows(reference.engine, windows, job.greedy)
    for model, tally in zip(models, tallies, strict=True):
        greedy = follow(model.engine, continued[label]) if job.greedy is not None else None
        yield EvaluationDone(
            model.artifact, label, total, tally.summary(), greedy,
            model.artifact is job.floor,
        )  # fmt: skip


def _score(logits: Floats, targets: Ids, base: Base | None, tally: Tally) -> None:
    if base is None:
        tally.add(losses(logits, targets))
    else:
        tally.add(*base.compare(logits, targets))


def _windows(job: EvaluationJob, begin: int | None, tokens: Tokens, label: str) -> Sequence[Window]:
    least, chunks = 2, job.chunks
    if job.base is not None:
        held = job.base.header.chunks
        least, chunks = 1, min(chunks or held, held)
    return cut(
        tokens, job.length,
        begin=begin, chunks=chunks, stride=job.stride, name=label, least=least,
    )  # fmt: skip
