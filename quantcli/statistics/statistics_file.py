"""Statistics beyond the importance matrix, on their way into one safetensors file.

For a tensor NAME with M matrices (1 unless it is a stack of experts) of C columns the file holds
``NAME.counts`` I64 (M), and as asked ``NAME.abs_max``, ``NAME.mean_abs``, ``NAME.mean``,
``NAME.min`` and ``NAME.max`` F32 (M, C), ``NAME.histogram`` F32 (M, bins;
`quantcli.statistics.input_histogram`) and ``NAME.hessian`` F32 (M, C, C), the sum of x x^T over the
counted inputs. Tensors that share their input share one Hessian; the metadata's ``hessian_of`` maps
each tensor to the holder. Of layer N's key-value cache it holds ``blk.N.cache.counts`` I64 (1), the
tokens, and ``blk.N.cache.k_max`` and ``blk.N.cache.v_max`` F32 (1, heads), the largest magnitudes.
Values are handed on matrix by matrix, since a model's Hessians are larger than its weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.sources.files import StoredFile
from quantcli.sources.safetensors import parse_header
from quantcli.statistics.input_statistics import CACHE, HISTOGRAM, MEAN, MIN_MAX
from quantcli.types import Declared

STATISTICS_FORMAT = "quantcli.statistics/1"
_TYPES: dict[str, Any] = {"I64": np.int64, "F32": np.float32}

CACHE_KINDS = ("k_max", "v_max")
"""What is stored of a cache, (1, heads) each."""
_NEED_OF = {
    "mean": MEAN, "min": MIN_MAX, "max": MIN_MAX, "histogram": HISTOGRAM, "k_max": CACHE,
    "v_max": CACHE,
}  # fmt: skip
_MEANS = ("mean_abs", "mean")
_LARGEST = ("abs_max", "max", *CACHE_KINDS)

StatisticsChunk = tuple[str, int, NDArray[Any]]
"""A tensor's name, an offset in bytes within it, and the values from there."""


class StatisticsSource(Protocol):
    """What a statistics file is made of."""

    @property
    def tensors(self) -> list[Declared]:
        """Every tensor, sorted by name."""

    @property
    def shares(self) -> dict[str, str]:
        """From a tensor to the one whose Hessian is also its own."""

    def parts(self) -> Iterator[StatisticsChunk]:
        """The values, once each, in any order."""


def cache_name(layer: int) -> str:
    """What statistics of a layer's key-value cache are called."""
    return f"blk.{layer}.cache"


def _parse_shares(path: Path, content: str | None) -> dict[str, str]:
    try:
        found = json.loads(content or "")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise SourceError(f"{path}: its metadata has no names by name under 'hessian_of'")
    return found


class StatisticsFile:
    """A statistics file, open for reading; a context manager that closes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = StoredFile(path)
        try:
            self._header = parse_header(self._file)
            facts = self._header.metadata
            if facts.get("format") != STATISTICS_FORMAT:
                raise SourceError(f"{path}: is no statistics file of quantcli")
            self.shares = _parse_shares(path, facts.get("hessian_of"))
            for name, info in self._header.tensors.items():
                if info.dtype not in _TYPES or not info.shape or 0 in info.shape:
                    raise SourceError(
                        f"{path}: {name} has dtype {info.dtype} and shape {info.shape}, which "
                        "no statistics have"
                    )
        except BaseException:
            self._file.close()
            raise
        self.tensors = {
            name: Declared(name, info.dtype, info.shape)
            for name, info in self._header.tensors.items()
        }

    def __enter__(self) -> StatisticsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str, matrix: int) -> NDArray[Any]:
        """Matrix ``matrix`` of the tensor ``name``, without its first axis."""
        info = self._header.tensors[name]
        size = info.nbytes // info.shape[0]
        raw = self._file.read(self._header.offsets[name] + matrix * size, size)
        values: NDArray[Any] = np.frombuffer(raw, _TYPES[info.dtype])
        return values.reshape(info.shape[1:])

    def count(self, name: str, matrix: int = 0) -> int:
        """Inputs of GGUF's tensor ``name`` that were seen; experts each have their own."""
        return int(self._find(name, "counts", matrix))

    def hessian(self, name: str, matrix: int = 0) -> NDArray[np.float32]:
        """The mean of x x^T over the tensor's inputs, shape (columns, columns)."""
        count = max(1, self.count(name, matrix))
        total = self._find(self.shares.get(name, name), "hessian", matrix)
        return np.asarray(total / np.float32(count), np.float32)

    def abs_max(self, name: str, matrix: int = 0) -> NDArray[np.float32]:
        """The largest |x|, shape (columns,)."""
        return self._find(name, "abs_max", matrix)

    def mean_abs(self, name: str, matrix: int = 0) -> NDArray[np.float32]:
        """The mean |x|, shape (columns,)."""
        return self._find(name, "mean_abs", matrix)

    def mean(self, name: str, matrix: int = 0) -> NDArray[np.float32]:
        """The mean x, shape (columns,)."""
        return self._find(name, "mean", matrix)

    def has(self, name: str, kind: str) -> bool:
        """Whether it holds this of a tensor."""
        return f"{name}.{kind}" in self.tensors

    def matrices(self, name: str) -> int:
        """How many matrices the tensor ``name`` has; 0 where nothing is known of it."""
        return self.tensors[f"{name}.counts"].shape[0] if self.has(name, "counts") else 0

    def columns(self, name: str) -> int:
        """The length of its matrices' rows; 0 where no statistic by column is known."""
        kinds = [kind for kind in ("min", "max", "abs_max") if self.has(name, kind)]
        return self.tensors[f"{name}.{kinds[0]}"].shape[-1] if kinds else 0

    def min_max(self, name: str, matrix: int = 0) -> tuple[float, float]:
        """The least and the largest x over all columns, zero among them.

        Where the file has the largest |x| alone (``abs_max``), it is both, with its sign.
        """
        if not self.has(name, "min") and self.has(name, "abs_max"):
            largest = float(self.abs_max(name, matrix).max())
            return -largest, largest
        low, high = self._find(name, "min", matrix), self._find(name, "max", matrix)
        return float(low.min()), float(high.max())

    def histogram(self, name: str, matrix: int = 0) -> NDArray[np.float64]:
        """How the values of x are spread over all columns, each token's by its size."""
        return np.asarray(self._find(name, HISTOGRAM, matrix), np.float64)

    def cache_max(self, layer: int) -> tuple[float, float]:
        """The largest magnitudes of the keys and of the values of a layer's cache."""
        keys, values = (self._find(cache_name(layer), kind, 0).max() for kind in CACHE_KINDS)
        return float(keys), float(values)

    def _find(self, name: str, kind: str, matrix: int) -> NDArray[Any]:
        if f"{name}.{kind}" not in self.tensors:
            need = _NEED_OF.get(kind, "hessian,abs_max,mean_abs")
            raise SourceError(
                f"{self.path} has no {kind} of {name}",
                hint=f"calibrate again with --collect {need}",
            )
        # Matrices that have one input have one Hessian.
        held = self.tensors[f"{name}.{kind}"].shape[0]
        return self.read(f"{name}.{kind}", min(matrix, held - 1))


class MergedStatistics:
    """Several statistics files as one: counts and Hessians add up, maxima and means combine.

    SourceError when they do not hold the same tensors.
    """

    def __init__(self, files: Sequence[StatisticsFile]) -> None:
        self._files = files
        first = files[0]
        for other in files[1:]:
            if other.tensors != first.tensors or other.shares != first.shares:
                raise SourceError(
                    f"{first.path} and {other.path} hold different statistics",
                    hint="merge calibrations of one model with the same --collect",
                )
        self.tensors = [first.tensors[name] for name in sorted(first.tensors)]
        self.shares = first.shares

    def parts(self) -> Iterator[StatisticsChunk]:
        """The values, matrix by matrix; sums and means are taken in float64."""
        for tensor in self.tensors:
            stem, _, kind = tensor.name.rpartition(".")
            size = tensor.nbytes // tensor.shape[0]
            for matrix in range(tensor.shape[0]):
                found = [file.read(tensor.name, matrix) for file in self._files]
                counts = [int(file.read(f"{stem}.counts", matrix)) for file in self._files]
                yield tensor.name, matrix * size, _combine(kind, found, counts)


def _combine(kind: str, found: list[NDArray[Any]], counts: list[int]) -> NDArray[Any]:
    if kind in _LARGEST:
        return np.ascontiguousarray(np.maximum.reduce(found))
    if kind == "min":
        return np.ascontiguousarray(np.minimum.reduce(found))
    if kind == "counts":
        return np.array([sum(counts)], np.int64)
    weights = [count / max(1, sum(counts)) for count in counts] if kind in _MEANS else None
    total = np.zeros(found[0].shape, np.float64)
    for index, values in enumerate(found):
        total += values if weights is None else values.astype(np.float64) * weights[index]
    return total.astype(np.float32)
