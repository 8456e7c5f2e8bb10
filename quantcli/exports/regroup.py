"""A GGUF split into shards, or the shards of one merged: the same tensors in other files.

Nothing is decoded. Every tensor's bytes, the order of the tensors and all key-values stay; only
the ``split.*`` keys come or go, as with llama.cpp's gguf-split, whose rule for sizes this follows:
headers do not count, and a tensor larger than the limit gets a shard of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantcli.artifacts.atomic import AtomicFiles, refuse_existing
from quantcli.artifacts.gguf_container import (
    FileLayout,
    TensorEntry,
    lay_out,
    shard_metadata,
    shard_paths,
)
from quantcli.errors import UsageError
from quantcli.exports.outcome import Exported
from quantcli.formats.container import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, padded
from quantcli.plan.budget import check_disk
from quantcli.sources.ggml_types import GGML_TYPES
from quantcli.sources.gguf import GgufCheckpoint
from quantcli.types import Event, MetaValue, Progress, TensorInfo, row_count

_SLAB_BYTES = 16 << 20
_TYPE_IDS = {kind.name: number for number, kind in GGML_TYPES.items()}


@dataclass(frozen=True)
class Regrouping:
    """Decided files: which tensors each holds, and where."""

    store: GgufCheckpoint
    groups: Mapping[Path, Sequence[TensorInfo]]
    layouts: Mapping[Path, FileLayout]
    force: bool

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that will be written."""
        return tuple(self.groups)

    @property
    def nbytes(self) -> int:
        """Exact size of all files together."""
        return sum(layout.size for layout in self.layouts.values())


def prepare(
    store: GgufCheckpoint,
    output: Path,
    *,
    max_bytes: int | None = None,
    force: bool = False,
    check: bool = True,
) -> Regrouping:
    """Decide how the tensors of ``store`` go into files of at most ``max_bytes`` of tensors each.

    Without a limit there is one file. OutputError when a file exists, is one of the source's own
    or does not fit on the disk.
    """
    metadata = {k: v for k, v in store.metadata.items() if not k.startswith("split.")}
    groups = _divide(list(store.tensors.values()), _alignment(metadata), max_bytes)
    paths = shard_paths(output, len(groups))
    layouts = {}
    for index, (path, group) in enumerate(zip(paths, groups, strict=True)):
        entries = [TensorEntry(t.name, t.shape, _TYPE_IDS[t.dtype], t.nbytes) for t in group]
        keys = shard_metadata(metadata, index, len(groups), len(store.tensors))
        layouts[path] = lay_out(keys, entries)
    job = Regrouping(store, dict(zip(paths, groups, strict=True)), layouts, force)
    if check:
        _refuse_own(store, paths)
        refuse_existing(paths, force=force)
        check_disk(job.nbytes, output.parent)
    return job


def execute(job: Regrouping) -> Iterator[Event]:
    """Copy the tensors, yielding progress, at last `Exported`."""
    total = sum(info.nbytes for group in job.groups.values() for info in group)
    done = 0
    sizes = {path: layout.size for path, layout in job.layouts.items()}
    with AtomicFiles(sizes, force=job.force) as files:
        for path, group in job.groups.items():
            layout = job.layouts[path]
            files.write(path, 0, layout.header)
            for info in group:
                place = layout.offsets[info.name]
                rows = row_count(info.shape)
                step = max(1, _SLAB_BYTES // max(1, info.nbytes // max(1, rows)))
                for start in range(0, rows, step):
                    part = job.store.read_rows(info.name, start, min(start + step, rows))
                    data = np.ascontiguousarray(part).view(np.uint8)
                    files.write(path, place, data.data)
                    place += data.nbytes
                    done += data.nbytes
                    yield Progress(done, total, info.name)
        files.publish()
    yield Exported(job.paths, job.nbytes)


def _divide(
    tensors: list[TensorInfo], alignment: int, max_bytes: int | None
) -> list[list[TensorInfo]]:
    if max_bytes is None:
        return [tensors]
    groups: list[list[TensorInfo]] = []
    filled = 0
    for info in tensors:
        size = padded(info.nbytes, alignment)
        if not groups or filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(info)
        filled += size
    return groups


def _alignment(metadata: Mapping[str, MetaValue]) -> int:
    found = metadata.get(ALIGNMENT_KEY)
    return DEFAULT_ALIGNMENT if found is None else int(found.value)


def _refuse_own(store: GgufCheckpoint, paths: Sequence[Path]) -> None:
    own = {file.resolve() for file in store.files}
    for path in paths:
        if path.resolve() in own:
            raise UsageError(
                f"{path} would be written over the file that is read",
                hint="name another one with -o",
            )
