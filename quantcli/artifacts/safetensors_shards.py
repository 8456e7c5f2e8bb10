"""A folder of safetensors files: which tensor is in which, where, and what lies with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.atomic_folder import AtomicFolder
from quantcli.artifacts.gguf_container import FileLayout
from quantcli.artifacts.safetensors_container import lay_out
from quantcli.artifacts.shards import split_shards
from quantcli.artifacts.write import Artifact, Chunk
from quantcli.plan.size_text import parse_size
from quantcli.types import Declared

LARGEST = parse_size("5G")
"""Bytes of a file's tensors at most, unless the user says otherwise; as transformers has it."""


@dataclass(frozen=True)
class SafetensorsShards:
    """Decided files: ``layouts`` by file name, ``places`` by tensor name.

    A place is the file's name, the tensor's offset in it, and what the header says of it.
    """

    layouts: Mapping[str, FileLayout]
    places: Mapping[str, tuple[str, int, Declared]]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: layout.size for name, layout in self.layouts.items()}

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(declared.nbytes for _, _, declared in self.places.values())

    def place(
        self, tensor: str, values: NDArray[Any], row: int = 0, column: int = 0
    ) -> Iterator[Chunk]:
        """``values`` (rows, columns) at ``row``, ``column`` of the tensor seen as a matrix.

        One chunk, or one for each row where they are only some of the columns.
        """
        name, offset, declared = self.places[tensor]
        width = declared.shape[-1] if declared.shape else 1
        at = offset + (row * width + column) * values.itemsize
        values = np.ascontiguousarray(values)
        data = values.reshape(values.shape[0], -1).view(np.uint8)
        if values.shape[1] == width:
            yield name, at, data.data
            return
        for line in data:
            yield name, at, line.data
            at += width * values.itemsize


class FolderArtifact(Artifact, Protocol):
    """A folder of ``weights`` and small ``files`` by name; ``force`` replaces one that exists."""

    path: Path
    weights: SafetensorsShards
    files: Mapping[str, bytes]
    force: bool

    @property
    def paths(self) -> tuple[Path, ...]:
        """The folder."""
        return (self.path,)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return self.weights.sizes | {name: len(body) for name, body in self.files.items()}

    @property
    def nbytes(self) -> int:
        """Exact size of all files together."""
        return sum(self.sizes.values())

    def open(self) -> AtomicFolder:
        """The folder, to be written."""
        return AtomicFolder(self.path, self.sizes, force=self.force)

    def heads(self) -> Iterator[Chunk]:
        """The small files, and the header of each file of weights."""
        yield from ((name, 0, body) for name, body in self.files.items())
        yield from ((name, 0, layout.header) for name, layout in self.weights.layouts.items())


def lay_out_shards(
    metadata: Mapping[str, str], tensors: Sequence[Declared], limit: int
) -> SafetensorsShards:
    """The files of ``tensors``, in their order, of at most ``limit`` bytes of tensors each.

    They are named as transformers names them.
    """
    shards = split_shards(tensors, lambda tensor: tensor.nbytes, limit)
    count = len(shards)
    names = ["model.safetensors"]
    if count > 1:
        names = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
    layouts = {name: lay_out(metadata, shard) for name, shard in zip(names, shards, strict=True)}
    places = {
        tensor.name: (name, layouts[name].offsets[tensor.name], tensor)
        for name, shard in zip(names, shards, strict=True)
        for tensor in shard
    }
    return SafetensorsShards(layouts, places)
