"""What training changed of a model: factors of blocks, norms and biases, and codes if asked.

`Trained` replaces those in the packed rows of a run's store. It is one file in the run's folder,
about a hundredth of the model where codes stay, that appears whole or not at all; it also holds the
gain of training, so that a resumed run knows that training is done, and with what result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from quantcli.artifacts.atomic import AtomicFiles
from quantcli.artifacts.safetensors_container import lay_out
from quantcli.formats.base import Bytes, Floats
from quantcli.rounding.block_scales import Halves
from quantcli.sources.files import StoredFile
from quantcli.sources.safetensors import parse_header
from quantcli.types import Declared, MetaValue, f32, u32

_FILE = "end-to-end.safetensors"
_PACKED = "#packed"
"""Behind a tensor's name, which its factors have already."""
_ROWS = 4096


def _packed_name(name: str) -> str:
    return name + _PACKED


@dataclass(frozen=True, slots=True)
class TrainingGain:
    """Mean KL divergence on the held-out windows, before and after ``steps`` steps.

    ``after`` is that of the stored model: ``before``, where nothing better was found. ``stopped``
    is the step at which the loss was no longer finite, or 0.
    """

    steps: int
    before: float
    after: float
    stopped: int = 0

    @property
    def taken(self) -> bool:
        """Whether training found something better."""
        return self.after < self.before

    @property
    def keys(self) -> dict[str, MetaValue]:
        """What the output file records of it."""
        return {
            "quantcli.e2e.steps": u32(self.steps),
            "quantcli.e2e.held_out_kld_before": f32(self.before),
            "quantcli.e2e.held_out_kld_after": f32(self.after),
        }

    @property
    def fields(self) -> dict[str, object]:
        """The same as plain data."""
        return {
            "steps": self.steps,
            "held_out_kld_before": self.before,
            "held_out_kld_after": self.after,
            "taken": self.taken,
            "stopped_at_step": self.stopped or None,
        }


class Changes(Protocol):
    """Values that stand in place of those in the packed rows."""

    @property
    def vectors(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the tensors that are kept in float32 and were changed."""

    @property
    def factors(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes (rows, blocks, factors) of the factors that were changed, by tensor."""

    @property
    def codes(self) -> Mapping[str, tuple[int, int]]:
        """Shapes (rows, row bytes) of the packed tensors whose codes were changed."""

    def read_vector(self, name: str) -> Floats:
        """A tensor of ``vectors``."""

    def read_factors(self, name: str, start: int, stop: int) -> Halves:
        """Factors of the rows ``start:stop`` of a tensor of ``factors``."""

    def read_packed(self, name: str, start: int, stop: int) -> Bytes:
        """Packed rows of a tensor of ``codes``, uint8, whose factors do not count."""


def trained_path(folder: Path) -> Path:
    """The file of a training's result in a run's folder."""
    return folder / _FILE


def save_trained(folder: Path, changes: Changes | None, gain: TrainingGain) -> None:
    """Write ``changes``, or that there are none."""
    vectors = {} if changes is None else changes.vectors
    factors = {} if changes is None else changes.factors
    tensors = [Declared(name, "F16", shape) for name, shape in factors.items()]
    tensors += [Declared(name, "F32", shape) for name, shape in vectors.items()]
    codes = {} if changes is None else changes.codes
    tensors += [Declared(_packed_name(name), "U8", shape) for name, shape in codes.items()]
    layout = lay_out({"gain": json.dumps(asdict(gain))}, tensors)
    path = trained_path(folder)
    with AtomicFiles({path: layout.size}, force=True) as file:
        file.write(path, 0, layout.header)
        if changes is not None:
            for name, shape in factors.items():
                values = changes.read_factors(name, 0, shape[0])
                file.write(path, layout.offsets[name], np.ascontiguousarray(values).data)
            for name in vectors:
                file.write(path, layout.offsets[name], changes.read_vector(name).data)
            for name, (rows, width) in codes.items():
                for start in range(0, rows, _ROWS):
                    part = changes.read_packed(name, start, min(start + _ROWS, rows))
                    place = layout.offsets[_packed_name(name)] + start * width
                    file.write(path, place, np.ascontiguousarray(part).data)
        file.publish()


class Trained:
    """The result of a training in its file; `close` releases the file."""

    def __init__(self, folder: Path) -> None:
        self._file = StoredFile(trained_path(folder))
        self._header = parse_header(self._file)
        self.gain = TrainingGain(**json.loads(self._header.metadata["gain"]))
        tensors = self._header.tensors.items()
        self.vectors = {name: info.shape for name, info in tensors if info.dtype == "F32"}
        self.factors = {name: info.shape for name, info in tensors if info.dtype == "F16"}
        self.codes = {
            name.removesuffix(_PACKED): (info.shape[0], info.shape[1])
            for name, info in tensors
            if info.dtype == "U8"
        }

    def read_vector(self, name: str) -> Floats:
        """A tensor of ``vectors``, float32."""
        raw = self._file.read(self._header.offsets[name], self._header.tensors[name].nbytes)
        return np.frombuffer(raw, "<f4").reshape(self.vectors[name])

    def read_factors(self, name: str, start: int, stop: int) -> Halves:
        """Factors of the rows ``start:stop`` of a tensor, float16 (rows, blocks, factors)."""
        _, blocks, count = self.factors[name]
        width = 2 * blocks * count
        raw = self._file.read(self._header.offsets[name] + start * width, (stop - start) * width)
        return np.frombuffer(raw, "<f2").reshape(-1, blocks, count)

    def read_packed(self, name: str, start: int, stop: int) -> Bytes:
        """Packed rows ``start:stop`` of a tensor of ``codes``, uint8 (rows, row bytes)."""
        _, width = self.codes[name]
        place = self._header.offsets[_packed_name(name)] + start * width
        raw = self._file.read(place, (stop - start) * width)
        return np.frombuffer(raw, np.uint8).reshape(-1, width)

    def close(self) -> None:
        """Release the file."""
        self._file.close()
