"""Block scales, norms and biases as parameters of end-to-end training.

These are the float16 factors of blocks, and norms and biases, which stay in float32. Each stands
as ``start + size * offset``, with its own magnitude as its size, so that one rate fits all of them;
what is read is what will be stored, rounded to float16 where it has to be, and gradients pass that
rounding as if it were not there. Offsets move by Adam (arXiv:1412.6980). Everything lies in a file
in the run's folder, so that memory is the page cache's to give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from quantcli.artifacts.scratch import create_array
from quantcli.formats import get_format
from quantcli.formats.base import Bytes, Floats
from quantcli.ranks.group import Group
from quantcli.rounding.block_scales import (
    LARGEST,
    Halves,
    count_factors,
    factor_gradients,
    read_factors,
)
from quantcli.rounding.run_store import EncodedStore

ReadPacked = Callable[[str, int, int], Bytes]
"""Packed rows ``start:stop`` of a tensor, uint8."""

_BETAS = (0.9, 0.99)
_START, _SIZE, _OFFSET, _MEAN, _SQUARE, _GRADIENT, _BEST = range(7)
_SMALLEST = 0.1
"""What a value moves by at least, as a share of its tensor's mean magnitude: a bias may be 0."""


class ScaleParameters:
    """Offsets of tensors in ``store`` by format, and of ``vectors``: `ScaleChanges` in training.

    ``formats`` are those of block formats that have factors. ``read`` gives their packed rows,
    where codes are not those in the store.
    """

    def __init__(
        self, store: EncodedStore, formats: Mapping[str, str], vectors: Mapping[str, Floats],
        path: Path, read: ReadPacked | None = None,
    ) -> None:  # fmt: skip
        self._store, self._path = store, path
        self._read = read or store.read_stored
        self._formats = {name: get_format(kind) for name, kind in formats.items()}
        self._count = 0
        self.vectors = {name: values.shape for name, values in vectors.items()}
        self.factors: dict[str, tuple[int, ...]] = {}
        for name, fmt in self._formats.items():
            rows, width = store.shape(name)
            self.factors[name] = (rows, width // fmt.nbytes, count_factors(fmt))
        self._spans: dict[str, slice] = {}
        end = 0
        for name, shape in (self.factors | self.vectors).items():
            self._spans[name] = slice(end, end := end + int(np.prod(shape)))
        self._planes = create_array(path, np.float32, (7, max(1, end)))
        for name, fmt in self._formats.items():
            start = read_factors(fmt, self._packed(name)).astype(np.float32)
            self._of(_START, name)[:] = start
            self._of(_SIZE, name)[:] = np.abs(start)
        for name, values in vectors.items():
            self._of(_START, name)[:] = values
            size = np.abs(values)
            self._of(_SIZE, name)[:] = np.maximum(size, _SMALLEST * size.mean())

    def __contains__(self, name: str) -> bool:
        return name in self._spans

    def _of(self, plane: int, name: str) -> Floats:
        shape = (self.factors | self.vectors)[name]
        found: Floats = self._planes[plane][self._spans[name]].reshape(shape)
        return found

    def _packed(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        return self._read(name, start, stop or self._store.shape(name)[0])

    def read_vector(self, name: str) -> Floats:
        """A norm or bias as it now is, float32."""
        return self._of(_START, name) + self._of(_SIZE, name) * self._of(_OFFSET, name)

    def read_factors(self, name: str, start: int, stop: int) -> Halves:
        """Factors of rows as they now are, rounded to float16."""
        first, size, offset = (
            self._of(plane, name)[start:stop] for plane in (_START, _SIZE, _OFFSET)
        )
        return np.clip(first + size * offset, -LARGEST, LARGEST).astype(np.float16)

    def forget(self) -> None:
        """Set all gradients to zero."""
        self._planes[_GRADIENT] = 0

    def add_rows(self, name: str, first: int, gradient: Floats) -> None:
        """Add the gradient by consecutive rows (n, columns) of a tensor of blocks."""
        packed = self._packed(name, first, first + len(gradient))
        found = factor_gradients(self._formats[name], packed, gradient)
        part = slice(first, first + len(gradient))
        self._of(_GRADIENT, name)[part] += found * self._of(_SIZE, name)[part]

    def add_vector(self, name: str, gradient: Floats) -> None:
        """Add the gradient by a norm or bias."""
        self._of(_GRADIENT, name)[:] += gradient * self._of(_SIZE, name)

    def add_up(self, group: Group) -> None:
        """Have the gradients be those of all ranks together."""
        group.add_up(self._planes[_GRADIENT])

    @property
    def finite(self) -> bool:
        """Whether every gradient is a number."""
        return bool(np.isfinite(self._planes[_GRADIENT].sum(dtype=np.float64)))

    def descend(self, rate: float) -> None:
        """Move every offset by about ``rate`` of its size."""
        planes = self._planes
        self._count += 1
        first, second = (1 - beta**self._count for beta in _BETAS)
        for span in self._spans.values():
            offset, mean, square, gradient = planes[_OFFSET : _GRADIENT + 1, span]
            mean += (1 - _BETAS[0]) * (gradient - mean)
            square += (1 - _BETAS[1]) * (gradient * gradient - square)
            root = np.sqrt(square / np.float32(second))
            way = np.divide(mean / np.float32(first), root, out=np.zeros_like(root), where=root > 0)
            offset -= np.float32(rate) * way

    def keep(self) -> None:
        """Remember the present offsets."""
        self._planes[_BEST] = self._planes[_OFFSET]

    def restore(self) -> None:
        """Take up the offsets that were kept."""
        self._planes[_OFFSET] = self._planes[_BEST]

    def close(self) -> None:
        """Remove the file."""
        del self._planes
        self._path.unlink(missing_ok=True)
