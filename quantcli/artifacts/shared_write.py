"""One output by several processes: each writes its share of the slabs into the same files.

All plan alike, so that each knows every offset and which slabs are its own. A process that is run
again goes on from what its log tells, reading it over; whoever is last, when all have said that
they are done, reads what the others wrote, makes anew what is not as they left it, writes the
headers and gives the output its name. The bytes are those of one process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from quantcli.artifacts.kept_slabs import Recording, files_of, read_written
from quantcli.artifacts.read_ahead import ReadAhead
from quantcli.artifacts.slabs import Slab, work_slabs
from quantcli.artifacts.staging import MEETING, SHARED, claim, partial_path, remove_own
from quantcli.artifacts.write import (
    Artifact,
    ArtifactDone,
    Hashes,
    SlabKey,
    Writing,
    do_slab,
    share_slabs,
    threads_within,
)
from quantcli.errors import OutputError, UsageError
from quantcli.ranks.meeting import COUNT, Meeting
from quantcli.ranks.share import Share, name_of
from quantcli.ranks.slab_sums import Key, SlabLog, SlabRecord, read_log
from quantcli.types import Event, Note, Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Sharing:
    """This process's share, what all must have in common, and seconds to wait for one another."""

    share: Share
    facts: Mapping[str, str]
    timeout: float


def write_shared(
    artifacts: Sequence[Artifact], sharing: Sharing, *, threads: int | None = None
) -> Iterator[Event]:
    """Write this process's share of artifacts, and publish them where it is the last.

    Yields as `quantcli.artifacts.write.write_artifacts` does, an `ArtifactDone` where they have
    their names when it returns. A shard that is not the last ends with a `Note`. Whatever ends it
    early leaves what is written, and nothing under a final name.
    """
    workers = min(threads_within(artifact, threads, None) for artifact in artifacts)
    yield from dict.fromkeys(note for artifact in artifacts for note in artifact.notes)
    share, first = sharing.share, artifacts[0].paths[0]
    if share.merges and not (partial_path(first) / MEETING).is_dir():
        raise UsageError(
            f"no shard of {first} has begun", hint="start --shard 1/2 and --shard 2/2 first"
        )
    facts = json.dumps(sorted(f for f in sharing.facts.items() if f[0] != COUNT)).encode()
    name = SHARED + hashlib.sha256(facts).hexdigest()[:16]
    with ExitStack() as stack:
        staging = claim(first, shared=True)
        stack.callback(staging.leave)
        place = staging.folder / MEETING
        meeting = Meeting(place, share, sharing.facts, sharing.timeout)
        stack.callback(_remove_empty, meeting, artifacts)
        stack.enter_context(meeting)
        writings = [Writing(artifact, artifact.open()) for artifact in artifacts]
        for writing in writings:
            files_of(writing).share(name)
            stack.enter_context(writing.sink)
        work = _Work(meeting, writings, share.count or meeting.count())
        if not share.merges:
            yield from work.write_own(workers)
        if not (yield from work.wait_for_all(workers)):
            return
        published = False
        if meeting.claim():
            try:
                yield from work.publish(workers)
            except BaseException:
                meeting.resign()
                raise
            published = True
            meeting.close_down()
            _remove_partial(artifacts)
        if not published and not share.together:
            yield Note(f"{share.label} is done; another has published {first}")
        elif not published:
            yield from work.published()


def _remove_empty(meeting: Meeting, artifacts: Sequence[Artifact]) -> None:
    """Remove what nobody has written anything into."""
    if meeting.is_empty and not meeting.is_gone():
        _remove_partial(artifacts)


def _remove_partial(artifacts: Sequence[Artifact]) -> None:
    for artifact in artifacts:
        for path in artifact.paths:
            remove_own(partial_path(path))


class _Work:
    """What there is to do, and what the logs of all ranks tell of it."""

    def __init__(self, meeting: Meeting, writings: Sequence[Writing], count: int) -> None:
        self._meeting, self._share, self._count = meeting, meeting.share, count
        self._writings = writings
        self._slabs = share_slabs(writings)
        self._keys: dict[SlabKey, list[Key]] = {}
        for slab, parts in self._slabs.items():
            self._keys[slab] = [("", 0)] * len(parts)
        for writing in writings:
            for number, place in enumerate(writing.places):
                self._keys[place.key][place.use] = (writing.artifact.paths[0].name, number)
        sizes = [self._slab_of(key).nbytes for key in self._slabs]
        owners = self._share.divide(sizes, count)
        self._owners = dict(zip(self._slabs, owners, strict=True))
        self._records: dict[Key, SlabRecord] = {}
        self._own: set[SlabKey] = set()
        """Those that this process has made or found right."""

    def _slab_of(self, key: SlabKey) -> Slab:
        return self._slabs[key][0][0].slab

    # -- writing -------------------------------------------------------------------------------

    def write_own(self, threads: int) -> Iterator[Event]:
        """Write the slabs of this rank that are not there yet, and say that it is done."""
        index = self._share.index
        self._read_logs()
        self._meeting.unmark("done", index)
        self._meeting.unmark("checked", index)
        mine = [slab for slab, owner in self._owners.items() if owner == index]
        yield from self._ensure(mine, threads)
        for writing in self._writings:
            writing.sink.flush()
        self._meeting.mark("done", index)

    def _ensure(self, slabs: Sequence[SlabKey], threads: int) -> Generator[Event, None, int]:
        """Make those of the slabs that are not as their records say; returns how many were."""
        log = self._meeting.open_log()
        with ExitStack() as stack:
            stack.callback(log.close)
            reads = {slab: self._slabs[slab][0][0].read for slab in slabs}
            fresh = [slab for slab in slabs if self._keys[slab][0] not in self._records]
            if any(writing.artifact.is_remote for writing in self._writings):
                sizes = [self._slab_of(slab).nbytes for slab in fresh]
                ahead = stack.enter_context(ReadAhead([reads[slab] for slab in fresh], sizes))
                reads |= {slab: partial(ahead.take, i) for i, slab in enumerate(fresh)}
            tasks = [
                (self._slab_of(slab), partial(self._check_or_make, slab, reads[slab], log))
                for slab in slabs
            ]
            made = yield from self._watch(work_slabs(tasks, threads))
        self._own.update(slabs)
        return sum(made)

    def _watch(
        self, work: Generator[Progress, None, list[bool]]
    ) -> Generator[Event, None, list[bool]]:
        with closing(work):
            while True:
                try:
                    progress = next(work)
                except StopIteration as ended:
                    found: list[bool] = ended.value
                    return found
                self._meeting.check()
                yield progress

    def _check_or_make(self, slab: SlabKey, read: Callable[[], NDArray[Any]], log: SlabLog) -> bool:
        """Whether the slab had to be made, since it was not there as it should be."""
        if self._is_whole(slab):
            return False
        parts = self._slabs[slab]
        targets = [Recording(writing) for _, writing in parts]
        uses = [(part, to) for (part, _), to in zip(parts, targets, strict=True)]
        made = do_slab(read, uses, True)
        for writing in self._writings:
            if writing.error is not None:
                raise writing.error
        records = [
            target.record(self._share.index, made, use) for use, target in enumerate(targets)
        ]
        found = list(zip(self._keys[slab], records, strict=True))
        self._records.update(found)
        log.add(found)
        return True

    def _is_whole(self, slab: SlabKey) -> bool:
        """Whether every use of the slab is recorded, and lies there as its record says."""
        for key, (_, writing) in zip(self._keys[slab], self._slabs[slab], strict=True):
            record = self._records.get(key)
            if record is None or not record.holds(partial(read_written, writing)):
                return False
        return True

    def _read_logs(self) -> None:
        """Take up what all ranks have recorded; of a slab that several made, this one's own."""
        kept = {key: self._records[key] for slab in self._own for key in self._keys[slab]}
        for path in self._meeting.logs():
            self._records.update(read_log(path))
        self._records.update(kept)

    # -- the end -------------------------------------------------------------------------------

    def wait_for_all(self, threads: int) -> Generator[Event, None, bool]:
        """Whether all ranks are done, so that this one may publish.

        Those that run together wait for each other, and each reads what its neighbour wrote.
        """
        meeting, share = self._meeting, self._share
        if not share.together:
            done = meeting.marked("done", self._count)
            if all(done):
                self._read_logs()
                return True
            missing = [
                name_of(index, self._count, together=False)
                for index, is_done in enumerate(done)
                if not is_done
            ]
            if meeting.is_gone():
                yield Note(f"{share.label} is done, and the output is published")
            elif share.merges:
                raise OutputError(
                    f"{len(missing)} of {self._count} shards are not done: {_some(missing)}",
                    hint="run them; a shard that was killed goes on from where it was",
                )
            else:
                yield Note(
                    f"{share.label} is done; the output appears when {_some(missing)} "
                    f"{'is' if len(missing) == 1 else 'are'} done too, in the same folder"
                )
            return False
        for index in range(self._count):
            if not meeting.wait_for("done", index, by=index):
                raise OutputError(
                    f"rank {index} of {self._count} has shown no sign of life for "
                    f"{meeting.timeout:g} s, and its share is not written",
                    hint=f"start it again, alone or all together: what is in "
                    f"{meeting.folder.parent} need not be done again",
                )
        self._read_logs()
        neighbour = (share.index + 1) % self._count
        if not meeting.marked("checked", self._count)[neighbour]:
            theirs = [slab for slab, owner in self._owners.items() if owner == neighbour]
            yield from self._repair(theirs, threads)
            meeting.mark("checked", neighbour)
        return True

    def _repair(self, slabs: Sequence[SlabKey], threads: int) -> Iterator[Event]:
        """Read slabs that others wrote, and make those anew that are not as they were left."""
        made = yield from self._ensure([s for s in slabs if s not in self._own], threads)
        if made:
            yield Note(
                f"{made} slab{'s were' if made > 1 else ' was'} not as "
                f"{'they were' if made > 1 else 'it was'} left, and made anew", "warning",
            )  # fmt: skip

    def publish(self, threads: int) -> Iterator[Event]:
        """Check what nobody has checked, write the headers, give each artifact its name."""
        checked = [False] * self._count
        if self._share.together:
            for index in range(self._count):
                by = (index - 1) % self._count
                checked[index] = self._meeting.wait_for("checked", index, by)
            self._read_logs()
        rest = [slab for slab, owner in self._owners.items() if not checked[owner]]
        yield from self._repair(rest, threads)
        hashes = self._hashes()
        # The first is published last: the meeting is in its folder, and a set is found by it.
        for writing in reversed(self._writings):
            writing.write_all(writing.artifact.heads())
            yield from writing.publish(hashes)
            if writing.error is not None:
                raise writing.error

    def _hashes(self) -> dict[SlabKey, Hashes]:
        found = {}
        for slab, keys in self._keys.items():
            records = [self._records[key] for key in keys]
            found[slab] = Hashes(records[0].read, [record.content for record in records])
        return found

    def published(self) -> Iterator[ArtifactDone]:
        """That another rank has given the artifacts their names."""
        hashes = self._hashes()
        for writing in self._writings:
            artifact = writing.artifact
            digest = artifact.digest(writing.leaves(hashes))
            bits = artifact.bits_per_weight
            yield ArtifactDone(artifact.paths, artifact.nbytes, bits, digest)


def _some(names: Sequence[str]) -> str:
    if len(names) > 6:
        return ", ".join(names[:6]) + ", ..."
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
