"""Encoded tensors on their way into the output, recorded in one file a layer in a run's folder.

The run's folder, its state and what makes two runs the same are those of a calibration
(`quantcli.layerwise.checkpoint`). A layer's file appears whole or not at all. It holds the packed
rows, or where these go to their places in the output at once, their digests. What training changed
afterwards lies over them (`quantcli.rounding.trained`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from quantcli.artifacts.atomic import AtomicFiles
from quantcli.artifacts.held_output import HeldOutput
from quantcli.artifacts.safetensors_container import lay_out
from quantcli.formats import get_format
from quantcli.formats.base import Bytes
from quantcli.rounding.block_scales import write_factors
from quantcli.rounding.options import Outcome
from quantcli.rounding.trained import Changes, Trained, trained_path
from quantcli.sources.files import StoredFile
from quantcli.sources.safetensors import parse_header
from quantcli.types import Declared

_PUT = "put"
"""Where a layer's file has the shapes and digests of what went into the output."""


class EncodedStore:
    """Packed rows by GGUF tensor name, readable as soon as their layer was saved.

    ``changes`` stand in place of what was saved, and add tensors that are kept in float32. Rows lie
    in the ``held`` output where there is one. Of an output that is whole nothing can be read.
    """

    def __init__(self, folder: Path, held: HeldOutput | None = None) -> None:
        self.folder = folder
        self.held = held
        self.changes: Changes | None = None
        self.trained: Trained | None = None
        self._files: list[StoredFile] = []
        self._places: dict[str, tuple[StoredFile, int, tuple[int, ...]]] = {}
        self._put: dict[str, tuple[int, int]] = {}
        self._formats: dict[str, str] = {}
        self.outcomes: list[Outcome] = []

    def __contains__(self, name: str) -> bool:
        return (
            name in self._places
            or name in self._put
            or (self.changes is not None and name in self.changes.vectors)
        )

    def save(self, layer: int, packed: Mapping[str, Bytes], outcomes: Sequence[Outcome]) -> None:
        """Write a layer's packed tensors, each (rows, row bytes), and open them."""
        facts = {"outcomes": json.dumps([asdict(outcome) for outcome in outcomes])}
        tensors: list[Declared] = []
        if self.held is not None:
            digests = self.held.put(packed)
            facts[_PUT] = json.dumps(
                {name: [*packed[name].shape, digest] for name, digest in digests.items()}
            )
        else:
            tensors = [Declared(name, "U8", rows.shape) for name, rows in packed.items()]
        layout = lay_out(facts, tensors)
        path = self._path(layer)
        with AtomicFiles({path: layout.size}, force=True) as file:
            file.write(path, 0, layout.header)
            for tensor in tensors:
                rows = np.ascontiguousarray(packed[tensor.name])
                file.write(path, layout.offsets[tensor.name], rows.data)
            file.publish()
        self._open(layer)

    def has(self, layer: int) -> bool:
        """Whether an earlier run has finished this layer's file."""
        return self._path(layer).is_file()

    def load(self, layer: int) -> None:
        """Open the file of a layer that an earlier run finished.

        OutputError where what it put into the output is not there.
        """
        for name, digest in self._open(layer).items():
            if self.held is not None:
                self.held.check(name, digest)

    def _open(self, layer: int) -> dict[str, str]:
        """Open a layer's file; the digests of what was put into the output."""
        file = StoredFile(self._path(layer))
        self._files.append(file)
        header = parse_header(file)
        for name, info in header.tensors.items():
            self._places[name] = (file, header.offsets[name], info.shape)
        outcomes = [Outcome(**fields) for fields in json.loads(header.metadata["outcomes"])]
        self._formats |= {outcome.tensor: outcome.format for outcome in outcomes}
        self.outcomes += outcomes
        put = json.loads(header.metadata.get(_PUT, "{}"))
        self._put |= {name: (rows, width) for name, (rows, width, _) in put.items()}
        return {name: digest for name, (_, _, digest) in put.items()}

    def shape(self, name: str) -> tuple[int, int]:
        """Rows of a saved tensor, and bytes in a row."""
        if name in self._put:
            return self._put[name]
        rows, width = self._places[name][2]
        return rows, width

    def read_stored(self, name: str, start: int, stop: int) -> Bytes:
        """Packed rows ``start:stop`` as they were saved, uint8 (stop - start, row bytes)."""
        if name in self._put:
            if self.held is None:
                raise ValueError(f"{name} is in an output that is whole")
            return self.held.read_rows(name, start, stop)
        file, offset, (_, width) = self._places[name]
        raw = file.read(offset + start * width, (stop - start) * width)
        return np.frombuffer(raw, np.uint8).reshape(-1, width)

    def read_rows(self, name: str, start: int, stop: int) -> Bytes:
        """Packed rows ``start:stop`` with what was changed, uint8 (stop - start, row bytes)."""
        changes = self.changes
        if changes is not None and name in changes.vectors:
            return changes.read_vector(name).reshape(1, -1).view(np.uint8)
        if changes is not None and name in changes.codes:
            packed = changes.read_packed(name, start, stop)
        else:
            packed = self.read_stored(name, start, stop)
        if changes is None or name not in changes.factors:
            return packed
        fmt = get_format(self._formats[name])
        return write_factors(fmt, packed, changes.read_factors(name, start, stop))

    def open_trained(self) -> bool:
        """Take up what a finished training changed; False where there is none."""
        if not trained_path(self.folder).is_file():
            return False
        self.changes = self.trained = Trained(self.folder)
        return True

    def close(self) -> None:
        """Release the files."""
        for file in self._files:
            file.close()
        if self.trained is not None:
            self.trained.close()
        self._files.clear()

    def _path(self, layer: int) -> Path:
        return self.folder / f"encoded-{layer:04d}.safetensors"
