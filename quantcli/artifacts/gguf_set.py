"""A GGUF split into shards, or the shards of one merged: the same tensors in other files.

Nothing is decoded. Every tensor's bytes, the order of the tensors and all key-values stay; only
the ``split.*`` keys come or go, as with llama.cpp's gguf-split, whose rule for sizes this follows:
headers do not count, and a tensor larger than the limit gets a shard of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.atomic import refuse_existing, refuse_own
from quantcli.artifacts.gguf_container import (
    FileLayout,
    TensorEntry,
    lay_out_shards,
    shard_paths,
)
from quantcli.artifacts.gguf_shards import GgufShards
from quantcli.artifacts.shards import split_shards
from quantcli.artifacts.slabs import SLAB_BYTES, Slab, combine_digest, cut_slabs
from quantcli.artifacts.write import ArtifactPart, Chunk
from quantcli.formats.container import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, padded
from quantcli.plan.budget import check_disk
from quantcli.sources.ggml_types import GGML_TYPES
from quantcli.sources.gguf import GgufCheckpoint, is_split_key
from quantcli.types import MetaValue, Note, TensorInfo, row_count

_TYPE_IDS = {kind.name: number for number, kind in GGML_TYPES.items()}


@dataclass(frozen=True)
class GgufSet(GgufShards):
    """Decided files: which tensors each holds, and where."""

    store: GgufCheckpoint
    metadata: Mapping[str, MetaValue]
    groups: Mapping[Path, Sequence[TensorInfo]]
    layouts: Mapping[Path, FileLayout]
    force: bool

    notes: ClassVar[Sequence[Note]] = ()

    @property
    def label(self) -> str:
        """The file that is read, or the first of them."""
        return str(self.store.files[0])

    @property
    def source(self) -> object:
        """The files that are read."""
        return self.store

    @property
    def thread_bytes(self) -> int:
        """A slab, or the longest row."""
        infos = self.store.tensors.values()
        return max(SLAB_BYTES, *(info.nbytes // max(1, row_count(info.shape)) for info in infos))

    def parts(self) -> Iterator[ArtifactPart]:
        """The slabs of each tensor."""
        for path, infos in self.groups.items():
            for info in infos:
                for slab in _cut(info):
                    offset = self.layouts[path].offsets[info.name]
                    offset += slab.start * (info.nbytes // max(1, row_count(info.shape)))
                    read = partial(self.store.read_rows, info.name, slab.start, slab.stop)
                    yield ArtifactPart(slab, read, partial(_copy, path, offset))

    @property
    def hashed(self) -> bool:
        """Whether there are several files, whose id is made of the weights too."""
        return len(self.groups) > 1

    def digest(self, leaves: Mapping[Slab, bytes]) -> str | None:
        """The digest of the tensors' bytes, where it is wanted."""
        if not self.hashed:
            return None
        infos = self.store.tensors.values()
        return combine_digest((info, [leaves[slab] for slab in _cut(info)]) for info in infos)

    def tails(self, digest: str | None, content: str) -> Iterator[Chunk]:
        """The headers again, with the id of the set in its place."""
        if digest is not None:
            yield from replace(self, layouts=_lay_out(self.metadata, self.groups, digest)).heads()


def _cut(info: TensorInfo) -> Iterator[Slab]:
    return cut_slabs(info.name, range(row_count(info.shape)), info.nbytes)


def _copy(path: Path, offset: int, rows: NDArray[Any]) -> Iterator[Chunk]:
    yield path, offset, np.ascontiguousarray(rows).view(np.uint8).data


def prepare_gguf_set(
    store: GgufCheckpoint,
    output: Path,
    *,
    max_bytes: int | None = None,
    force: bool = False,
    check: bool = True,
) -> GgufSet:
    """Decide how the tensors of ``store`` go into files of at most ``max_bytes`` of tensors each.

    Without a limit there is one file. OutputError when a file exists, is one of the source's own
    or does not fit on the disk.
    """
    metadata = {k: v for k, v in store.metadata.items() if not is_split_key(k)}
    alignment = _alignment(metadata)
    groups = split_shards(
        store.tensors.values(), lambda info: padded(info.nbytes, alignment), max_bytes
    )
    paths = shard_paths(output, len(groups))
    held = dict(zip(paths, groups, strict=True))
    job = GgufSet(store, metadata, held, _lay_out(metadata, held), force)
    if check:
        refuse_own(paths, store.files)
        refuse_existing(paths, force=force)
        check_disk(job.nbytes, output.parent)
    return job


def _lay_out(
    metadata: Mapping[str, MetaValue], groups: Mapping[Path, Sequence[TensorInfo]], digest: str = ""
) -> dict[Path, FileLayout]:
    entries = {
        path: [TensorEntry(t.name, t.shape, _TYPE_IDS[t.dtype], t.nbytes) for t in group]
        for path, group in groups.items()
    }
    return lay_out_shards(metadata, entries, digest)


def _alignment(metadata: Mapping[str, MetaValue]) -> int:
    found = metadata.get(ALIGNMENT_KEY)
    return DEFAULT_ALIGNMENT if found is None else int(found.value)
