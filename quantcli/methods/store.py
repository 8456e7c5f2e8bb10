"""Encoded tensors on their way into the output: one file a layer, in the folder of a run.

The run's folder, its state and what makes two runs the same are those of a calibration
(`quantcli.calib.checkpoint`). A layer's file appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from quantcli.formats.base import Bytes
from quantcli.methods.options import Outcome
from quantcli.sources.files import StoredFile
from quantcli.sources.safetensors import parse_header
from quantcli.writers.atomic import AtomicFiles
from quantcli.writers.safetensors import Declared, lay_out


class EncodedStore:
    """Packed rows by GGUF tensor name, readable as soon as their layer was saved."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[StoredFile] = []
        self._places: dict[str, tuple[StoredFile, int, int]] = {}
        self.outcomes: list[Outcome] = []

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def save(self, layer: int, packed: Mapping[str, Bytes], outcomes: Sequence[Outcome]) -> None:
        """Write a layer's packed tensors, each (rows, row bytes), and open them."""
        tensors = [Declared(name, "U8", rows.shape) for name, rows in packed.items()]
        facts = {"outcomes": json.dumps([asdict(outcome) for outcome in outcomes])}
        layout = lay_out(facts, tensors)
        path = self._path(layer)
        with AtomicFiles({path: layout.size}, force=True) as file:
            file.write(path, 0, layout.header)
            for name, rows in packed.items():
                file.write(path, layout.offsets[name], np.ascontiguousarray(rows).data)
            file.publish()
        self.load(layer)

    def has(self, layer: int) -> bool:
        """Whether an earlier run has finished this layer's file."""
        return self._path(layer).is_file()

    def load(self, layer: int) -> None:
        """Open the file of a layer that an earlier run finished."""
        file = StoredFile(self._path(layer))
        self._files.append(file)
        header = parse_header(file)
        for name, info in header.tensors.items():
            self._places[name] = (file, header.offsets[name], info.shape[1])
        self.outcomes += [Outcome(**fields) for fields in json.loads(header.metadata["outcomes"])]

    def read_rows(self, name: str, start: int, stop: int) -> Bytes:
        """Packed rows ``start:stop`` of a tensor, uint8 of shape (stop - start, row bytes)."""
        file, offset, width = self._places[name]
        raw = file.read(offset + start * width, (stop - start) * width)
        return np.frombuffer(raw, np.uint8).reshape(-1, width)

    def close(self) -> None:
        """Release the files."""
        for file in self._files:
            file.close()
        self._files.clear()

    def _path(self, layer: int) -> Path:
        return self._folder / f"encoded-{layer:04d}.safetensors"
