"""What a calibration leaves behind after each layer, so that it can go on where it stopped.

A folder beside the output holds the hidden states after the last finished layer, one file of
statistics for each layer, and ``state.json``, which is replaced last: it says how far the rest is
valid, and of which model, text and settings. A run with any of these changed is not continued.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.atomic import AtomicFiles
from quantcli.artifacts.safetensors_container import lay_out
from quantcli.errors import OutputError, SourceError
from quantcli.sources.files import StoredFile
from quantcli.sources.safetensors import parse_header
from quantcli.statistics.collector import Collector, Entry
from quantcli.types import Declared

_STATE = "state.json"
_FIELDS = {"counts": "I64", "squares": "F64", "largest": "F64", "absolute": "F64"}
_HESSIAN = "hessian"
_TYPES = {"I64": np.int64, "F64": np.float64, "F32": np.float32}


def checkpoint_folder(output: Path) -> Path:
    """Where the checkpoint of a calibration that will be ``output`` lies."""
    return output.with_name(f".{output.name}.partial-run")


@dataclass
class Checkpoint:
    """The folder, the run's identity, and how many layers are done."""

    folder: Path
    identity: Mapping[str, object]
    done: int = 0
    turn: int = 0

    def begin(self, *, resume: bool, force: bool) -> None:
        """Take the folder into use: read it with ``resume``, else start with an empty one.

        OutputError when a checkpoint is there and neither was asked for; SourceError when it is
        of another run.
        """
        state = self.folder / _STATE
        if state.is_file() and not resume and not force:
            raise OutputError(
                f"{self.folder} holds what an interrupted calibration has finished",
                hint="--resume continues it, --force starts anew",
            )
        if not (resume and state.is_file()):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            return
        try:
            found = json.loads(state.read_text())
            begun, self.done, self.turn = found["identity"], found["done"], found["turn"]
        except (ValueError, KeyError, TypeError) as broken:
            raise SourceError(f"{state} is damaged", hint="--force starts anew") from broken
        for key, value in self.identity.items():
            if begun.get(key) != value:
                raise SourceError(
                    f"{self.folder} was begun with another {key}",
                    hint="--resume takes the same model, data and options; --force starts anew",
                )

    def save(self, layer: int, collector: Collector) -> None:
        """Write the statistics of ``layer``."""
        values: dict[str, NDArray[np.generic]] = {}
        tensors: list[Declared] = []
        for name, entry in collector.entries.items():
            for field, dtype in _FIELDS.items():
                value = getattr(entry, field)
                values[f"{name}.{field}"] = value
                tensors.append(Declared(f"{name}.{field}", dtype, value.shape))
        for name, value in collector.hessians().items():
            values[f"{name}.{_HESSIAN}"] = value
            tensors.append(Declared(f"{name}.{_HESSIAN}", "F32", value.shape))
        layout = lay_out({"shares": json.dumps(collector.hessian_of)}, tensors)
        path = self._layer(layer)
        with AtomicFiles({path: layout.size}, force=True) as file:
            file.write(path, 0, layout.header)
            for tensor in tensors:
                start = layout.offsets[tensor.name]
                # Matrix by matrix: the whole of a stack's Hessians may not fit into memory.
                for matrix in values[tensor.name]:
                    part = np.ascontiguousarray(matrix, dtype=_TYPES[tensor.dtype])
                    file.write(path, start, part.data if part.ndim else part.tobytes())
                    start += part.nbytes
            file.publish()

    def commit(self, done: int, turn: int) -> None:
        """From now on this many layers count as done."""
        self.done, self.turn = done, turn
        body = {"identity": dict(self.identity), "done": done, "turn": turn}
        fresh = self.folder / f"{_STATE}.new"
        with fresh.open("w") as file:
            json.dump(body, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.folder / _STATE)

    def read(self, layer: int) -> LayerFile:
        """Open the statistics of a finished layer."""
        return LayerFile(self._layer(layer))

    def remove(self) -> None:
        """The calibration is complete: take the folder away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _layer(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04d}.safetensors"


class LayerFile:
    """A finished layer's statistics; a context manager that closes the file."""

    def __init__(self, path: Path) -> None:
        self._file = StoredFile(path)
        self._header = parse_header(self._file)
        self.hessian_of: dict[str, str] = json.loads(self._header.metadata["shares"])
        self.hessians = [
            name.removesuffix(f".{_HESSIAN}")
            for name in self._header.tensors
            if name.endswith(f".{_HESSIAN}")
        ]

    def __enter__(self) -> LayerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def entries(self) -> dict[str, Entry]:
        """All sums but the Hessians."""
        suffix = ".counts"
        names = [n.removesuffix(suffix) for n in self._header.tensors if n.endswith(suffix)]
        return {
            name: Entry(*(self._whole(f"{name}.{field}") for field in _FIELDS)) for name in names
        }

    def hessian(self, name: str, matrix: int) -> NDArray[np.float32]:
        """Matrix ``matrix`` of a Hessian, shape (columns, columns), float32."""
        info = self._header.tensors[f"{name}.{_HESSIAN}"]
        size = 4 * info.shape[1] * info.shape[2]
        raw = self._file.read(self._header.offsets[info.name] + matrix * size, size)
        return np.frombuffer(raw, np.float32).reshape(info.shape[1:])

    def hessian_shape(self, name: str) -> tuple[int, ...]:
        """(matrices, columns, columns)."""
        return self._header.tensors[f"{name}.{_HESSIAN}"].shape

    def _whole(self, name: str) -> NDArray[Any]:
        info = self._header.tensors[name]
        raw = self._file.read(self._header.offsets[name], info.nbytes)
        return np.frombuffer(raw, _TYPES[info.dtype]).reshape(info.shape)
