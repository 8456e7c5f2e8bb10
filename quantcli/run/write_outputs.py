"""Outputs that are ready are written together: rows that several are made of are read once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantcli.artifacts.atomic import is_interrupt
from quantcli.artifacts.gguf_file import GgufFile, take_encoded
from quantcli.artifacts.shared_reads import SharedReads, reads_are_shared, slab_readers
from quantcli.artifacts.shared_write import Sharing, write_shared
from quantcli.artifacts.staging import partial_path
from quantcli.artifacts.write import (
    ArtifactDone,
    ArtifactFailed,
    ArtifactFlushed,
    Keeping,
    write_artifacts,
)
from quantcli.errors import OutputError
from quantcli.events import Events, in_phase
from quantcli.run.outputs import OutputDone, Planned, Quantized
from quantcli.types import Note

if TYPE_CHECKING:
    from quantcli.artifacts.model_folder import ModelFolder
    from quantcli.model import Model
    from quantcli.rounding.run_store import EncodedStore
    from quantcli.run.set_journal import SetJournal


_SHOWN = 10
"""Outputs that a sentence names."""


@dataclass
class Ledger:
    """What has become of a run's outputs, by their paths, since it ``began``."""

    planned: Sequence[Planned]
    journal: SetJournal | None
    began: float
    done: dict[Path, Quantized] = field(default_factory=dict)
    failed: dict[Path, OutputError] = field(default_factory=dict)

    def note(self, flushed: ArtifactFlushed) -> Iterator[Note]:
        """An output will be whole: so that one that has its name is always known to be."""
        if self.journal is None:
            return
        try:
            self.journal.add(flushed.paths[0].name, flushed.stamps, flushed.source_digest)
        except OutputError as error:
            yield Note(f"{error.message}; --resume will not know that {flushed.paths[0]} is whole",
                       "warning")  # fmt: skip

    def add(self, planned: Planned, quantized: Quantized) -> OutputDone:
        """An output is whole."""
        self.done[planned.path] = quantized
        return OutputDone(quantized)

    @property
    def finished(self) -> list[Quantized]:
        """The outputs that are whole, in the order in which they were asked for."""
        return [self.done[each.path] for each in self.planned if each.path in self.done]

    @property
    def is_complete(self) -> bool:
        """Whether all are whole."""
        return len(self.done) == len(self.planned)

    @property
    def state(self) -> str:
        """How many are whole, in words, and which."""
        names = [path.name for path in self.done]
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        return f"{len(names)} of {len(self.planned)} outputs are whole" + (
            f" ({shown})" if shown else ""
        )

    def last_words(self, stopped: BaseException) -> list[Note]:
        """What to say where the set is not finished: what there is, and how to go on."""
        left = [
            path for each in self.planned if each.path not in self.done
            for path in each.artifact.paths if partial_path(path).is_dir()
        ]  # fmt: skip
        if not self.done and not (left and is_interrupt(type(stopped))):
            return []
        return [Note(f"{self.state}; the same command with --resume makes the rest", "warning")]

    def refuse_failed(self) -> None:
        """OutputError where an output could not be written, with what is whole."""
        if not self.failed:
            return
        first, *others = self.failed.values()
        more = f" (and {len(others)} more)" if others else ""
        raise OutputError(
            f"{first.message}{more}; {self.state}",
            hint=f"{first.hint or 'find out why'}; the same command with --resume makes the rest",
        )


def write_outputs(
    ready: Sequence[Planned], ledger: Ledger, sharing: Sharing | None = None, *, resume: bool
) -> Events[None]:
    """Write outputs of one model, adding each to the ledger as it is whole or has failed.

    With ``sharing`` this process writes its share of them; they are whole when all have. With
    ``resume`` it goes on within the files that an interrupted run of the same set has left.
    """
    threads = min(each.threads for each in ready)
    with ExitStack() as stack:
        read = share_reads([each.artifact for each in ready], threads, stack)
        artifacts = [
            _with_codes(artifact, each.store) for artifact, each in zip(read, ready, strict=True)
        ]
        by_paths = {
            artifact.paths: (each, replace(artifact, model=each.artifact.model))
            for each, artifact in zip(ready, artifacts, strict=True)
        }
        if sharing is not None:
            events = write_shared(artifacts, sharing, threads=threads)
        else:
            keeping = None if ledger.journal is None else Keeping(ledger.journal.identity, resume)
            events = write_artifacts(artifacts, threads=threads, keeping=keeping)
        yield from in_phase("quantizing", _follow(cast(Any, events), by_paths, ledger))


def share_reads(
    artifacts: Sequence[GgufFile | ModelFolder], threads: int, stack: ExitStack
) -> list[GgufFile | ModelFolder]:
    """The artifacts, which read each slab of what they are made of once together.

    ``stack`` lets go of what is held for it.
    """
    if not reads_are_shared(artifacts):
        return list(artifacts)
    stores: dict[int, SharedReads] = {}
    models: dict[int, Model] = {}
    for artifact in artifacts:
        model = artifact.model
        if id(model.store) not in stores:
            shared = SharedReads.of(model.store, slab_readers(threads, remote=model.is_remote))
            stores[id(model.store)] = stack.enter_context(closing(shared))
        models.setdefault(id(model), replace(model, store=stores[id(model.store)]))
    return [replace(artifact, model=models[id(artifact.model)]) for artifact in artifacts]


def _follow(
    events: Events[None],
    by_paths: dict[tuple[Path, ...], tuple[Planned, GgufFile | ModelFolder]],
    ledger: Ledger,
) -> Events[None]:
    with closing(events):
        for event in events:
            if isinstance(event, ArtifactDone):
                each, artifact = by_paths[event.paths]
                seconds = time.monotonic() - ledger.began
                quantized = _describe(each, artifact, event.source_digest, seconds)
                yield ledger.add(each, quantized)
            elif isinstance(event, ArtifactFlushed):
                yield from ledger.note(event)
            elif isinstance(event, ArtifactFailed):
                ledger.failed[by_paths[event.paths][0].path] = event.error
                yield Note(f"{event.error.message}; the other outputs go on", "warning")
            else:
                yield event


def _describe(
    ready: Planned, artifact: GgufFile | ModelFolder, digest: str | None, seconds: float
) -> Quantized:
    store = ready.store
    if store is None:
        return Quantized(artifact, ready.threads, digest, seconds)
    gain = None if store.trained is None else store.trained.gain.fields
    return Quantized(artifact, ready.threads, digest, seconds, tuple(store.outcomes), gain)


def _with_codes(
    artifact: GgufFile | ModelFolder, store: EncodedStore | None
) -> GgufFile | ModelFolder:
    """The artifact with the tensors that a method rounded."""
    if store is None:
        return artifact
    if isinstance(artifact, GgufFile):
        return take_encoded(artifact, store, store.held)
    from quantcli.run.folder_codes import stored_codes

    return replace(artifact, codes=stored_codes(artifact, store))
