"""What a GGUF file and a set of them have in common: headers and sizes by path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from quantcli.artifacts.atomic import AtomicFiles
from quantcli.artifacts.gguf_container import FileLayout
from quantcli.artifacts.stream import StreamSink
from quantcli.artifacts.write import Artifact, Chunk


class GgufShards(Artifact, Protocol):
    """One GGUF or the shards of one, laid out; ``force`` replaces files that exist."""

    layouts: Mapping[Path, FileLayout]
    force: bool

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that will be written."""
        return tuple(self.layouts)

    @property
    def nbytes(self) -> int:
        """Exact size of all files together."""
        return sum(layout.size for layout in self.layouts.values())

    def open(self) -> AtomicFiles | StreamSink:
        """The files, to be written."""
        sizes = {path: layout.size for path, layout in self.layouts.items()}
        return AtomicFiles(sizes, force=self.force)

    def heads(self) -> Iterator[Chunk]:
        """The header of each file."""
        for path, layout in self.layouts.items():
            yield path, 0, layout.header
