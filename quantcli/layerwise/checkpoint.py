"""What a walk leaves behind after each layer, so that it can go on where it stopped.

A folder next to the output holds the hidden states after the last finished layer, one file for
each layer of what was found there, and ``state.json``, which is replaced last: it says how far the
rest is valid, and of which model, text and settings. A run with any of these changed is not
continued.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.atomic import AtomicFiles
from quantcli.artifacts.safetensors_container import lay_out
from quantcli.artifacts.staging import naming, own_folder, remove_own
from quantcli.errors import OutputError, SourceError
from quantcli.sources.files import StoredFile
from quantcli.sources.safetensors import parse_header
from quantcli.types import Declared

_STATE = "state.json"
_TYPES = {"I64": np.int64, "F64": np.float64, "F32": np.float32}


def checkpoint_folder(output: Path) -> Path:
    """Where the checkpoint of a calibration that will be ``output`` lies."""
    return output.with_name(f".{output.name}.partial-run")


def was_interrupted(output: Path) -> bool:
    """Whether a run that would have made ``output`` has left layers that can be continued."""
    return (checkpoint_folder(output) / _STATE).is_file()


@dataclass
class Checkpoint:
    """The folder, the run's identity, and how many layers are done."""

    folder: Path
    identity: Mapping[str, object]
    done: int = 0
    turn: int = 0
    writes: bool = True
    """Whether this process writes it; of several ranks the first does."""

    @property
    def progress(self) -> str:
        """What is said of it where a run ends early."""
        layers = "1 layer is" if self.done == 1 else f"{self.done} layers are"
        return f"{layers} done and kept in {self.folder}"

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
            own_folder(self.folder, empty=True)
            return
        own_folder(self.folder, empty=False)
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

    def save(
        self, layer: int, arrays: Mapping[str, tuple[str, NDArray[Any]]], metadata: dict[str, str]
    ) -> None:
        """Write what was found of ``layer``: by name a dtype ("I64", "F64", "F32") and values."""
        tensors = [Declared(name, kind, array.shape) for name, (kind, array) in arrays.items()]
        layout = lay_out(metadata, tensors)
        path = self._layer(layer)
        with AtomicFiles({path: layout.size}, force=True) as file:
            file.write(path, 0, layout.header)
            for tensor in tensors:
                start = layout.offsets[tensor.name]
                # Part by part: the whole of a stack's Hessians may not fit into memory.
                for values in arrays[tensor.name][1]:
                    part = np.ascontiguousarray(values, dtype=_TYPES[tensor.dtype])
                    file.write(path, start, part.data if part.ndim else part.tobytes())
                    start += part.nbytes
            file.publish()

    def commit(self, done: int, turn: int) -> None:
        """From now on this many layers count as done."""
        self.done, self.turn = done, turn
        if not self.writes:
            return
        body = {"identity": dict(self.identity), "done": done, "turn": turn}
        fresh = self.folder / f"{_STATE}.new"
        with naming(fresh):
            with fresh.open("w") as file:
                json.dump(body, file)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.folder / _STATE)

    def read(self, layer: int) -> LayerFile:
        """Open what was found of a finished layer."""
        return LayerFile(self._layer(layer))

    def remove(self) -> None:
        """The calibration is complete: take the folder away."""
        if self.writes:
            remove_own(self.folder)

    def _layer(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04d}.safetensors"


class LayerFile:
    """What was found of a finished layer; a context manager that closes the file."""

    def __init__(self, path: Path) -> None:
        self._file = StoredFile(path)
        self._header = parse_header(self._file)
        self.metadata = self._header.metadata
        self.shapes = {name: info.shape for name, info in self._header.tensors.items()}

    def __enter__(self) -> LayerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> NDArray[Any]:
        """The whole array."""
        info = self._header.tensors[name]
        raw = self._file.read(self._header.offsets[name], info.nbytes)
        return np.frombuffer(raw, _TYPES[info.dtype]).reshape(info.shape)

    def read_part(self, name: str, index: int) -> NDArray[Any]:
        """Number ``index`` along the array's first axis."""
        info = self._header.tensors[name]
        size = info.nbytes // info.shape[0]
        raw = self._file.read(self._header.offsets[name] + index * size, size)
        return np.frombuffer(raw, _TYPES[info.dtype]).reshape(info.shape[1:])
