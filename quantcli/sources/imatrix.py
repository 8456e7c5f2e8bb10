"""Importance matrices: the mean square of every input column of a tensor, as llama.cpp made them.

Two forms are read, told apart by their content. The GGUF form holds for each tensor the sums of
squares (``NAME.in_sum2``, one row for each matrix of a stack) and how many inputs were summed
(``NAME.counts``); the mean is their quotient in float32, and ones where nothing was counted. The
legacy form (.dat) holds means that were multiplied by a number of calls, and divides by it again.
The quotients are the very floats that llama-quantize hands to its encoders, so equal bytes follow.

A file that quantcli calibrated says so with a key of its own. There, and nowhere else, the means
of an expert that saw few tokens are drawn towards the mean over its layer's experts, instead of
trusting a handful of tokens; llama.cpp, which does not know the key, reads the raw quotients.

Refused: values that are negative or not finite, lengths that do not fit, a tensor that occurs
twice, anything cut short. Source: common_imatrix_load in llama.cpp's imatrix-loader.cpp and
load_imatrix in its quantize tool.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.sources.files import StoredFile
from quantcli.sources.gguf import GgufCheckpoint, is_gguf, open_gguf
from quantcli.types import row_count

DATASETS, CHUNK_COUNT, CHUNK_SIZE = (
    "imatrix.datasets",
    "imatrix.chunk_count",
    "imatrix.chunk_size",
)
ENOUGH = "quantcli.imatrix.enough_tokens"
"""From how many tokens on an expert's own mean is taken as it is."""
ENOUGH_TOKENS = 512
SUMS, COUNTS = ".in_sum2", ".counts"

_I32 = Struct("<i")
_LEGACY_NAME_CAP = 1024
"""No tensor name is longer; a larger length means that the file is something else."""


@dataclass(frozen=True, slots=True)
class Importance:
    """An importance matrix.

    ``entries`` maps a tensor's GGUF name to float32 mean squares of shape (matrices, columns).
    Where the file does not say how many matrices a stack has (the legacy form, and stacks that
    were counted as one), all of it is one row: ask `weights` for the shape that you need.
    """

    path: Path
    entries: dict[str, NDArray[np.float32]]
    datasets: tuple[str, ...]
    chunks: int

    def weights(self, name: str, matrices: int, columns: int) -> NDArray[np.float32] | None:
        """Mean squares of tensor ``name`` as (matrices, columns), or None when it has no entry.

        SourceError when the entry has another number of values: it is of another model.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry.size != matrices * columns:
            raise SourceError(
                f"{self.path}: entry {name!r} has {entry.size} values, but the tensor takes "
                f"{matrices * columns} ({matrices} x {columns})",
                hint="the importance matrix belongs to another model",
            )
        return entry.reshape(matrices, columns)


@dataclass(frozen=True, slots=True)
class ImatrixSums:
    """What the GGUF form holds: sums of squares (matrices, columns) and counts (matrices,)."""

    path: Path
    entries: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int
    enough: int = 0
    """What the file says of how many tokens on an expert's own mean is taken as it is."""


def read_sums(path: Path) -> ImatrixSums:
    """The raw sums of an importance matrix in the GGUF form; SourceError for anything else."""
    if not is_gguf(path):
        raise SourceError(
            f"{path}: is no importance matrix in the GGUF form",
            hint="the legacy form holds means without counts, which do not add up",
        )
    store = open_gguf(path)
    try:
        names = _pair_names(store, path)
        datasets, chunks = _read_facts(store, path)
        entries = {name: _read_pair(store, name, path) for name in names}
        size = int(store.metadata[CHUNK_SIZE].value)
        enough = _enough(store, path)
    finally:
        store.close()
    return ImatrixSums(path, entries, datasets, chunks, size, enough)


def read_legacy_sums(path: Path, chunk_size: int) -> ImatrixSums:
    """The legacy form as sums and counts, for windows of ``chunk_size`` tokens.

    That form holds means times calls, so each is multiplied by the window, as llama.cpp does; for
    a power of two nothing is rounded. SourceError when the file is broken.
    """
    raw, dataset, chunks = _read_legacy_entries(path)
    size = np.float32(chunk_size)
    entries = {
        name: ((values * size).reshape(1, -1), np.array([max(calls, 1)], np.float32) * size)
        for name, (values, calls) in raw.items()
    }
    return ImatrixSums(path, entries, (dataset,) if dataset else (), chunks, chunk_size)


def read_importance(path: Path) -> Importance:
    """Read an importance matrix in the GGUF or the legacy form; SourceError when it is broken."""
    return _read_gguf(path) if is_gguf(path) else _read_legacy(path)


def is_legacy_importance(path: Path) -> bool:
    """Whether a file that is no GGUF begins as a legacy importance matrix does."""
    file = StoredFile(path)
    try:
        return _legacy_entries(file) is not None
    finally:
        file.close()


def _check_values(values: NDArray[np.float32], name: str, path: Path) -> None:
    good = np.isfinite(values) & (values >= 0)
    if not good.all():
        place = int(np.argmin(good))
        value = float(values.reshape(-1)[place])
        raise SourceError(
            f"{path}: entry {name!r} has the value {value} at index {place}; mean squares are "
            "finite and not negative"
        )


# ---- the GGUF form


def _read_gguf(path: Path) -> Importance:
    store = open_gguf(path)
    try:
        names = _pair_names(store, path)
        datasets, chunks = _read_facts(store, path)
        entries = {name: _read_entry(store, name, path) for name in names}
    finally:
        store.close()
    return Importance(path, entries, datasets, chunks)


def _pair_names(store: GgufCheckpoint, path: Path) -> list[str]:
    sums = {n.removesuffix(SUMS) for n in store.tensors if n.endswith(SUMS)}
    counts = {n.removesuffix(COUNTS) for n in store.tensors if n.endswith(COUNTS)}
    if not sums and not counts:
        raise SourceError(
            f"{path}: is a GGUF file without importance data (no tensor ends in {SUMS})",
            hint="'quantcli calibrate MODEL --data TEXT' makes one, and so does llama-imatrix",
        )
    for name in sorted(sums ^ counts):
        has, lacks = (SUMS, COUNTS) if name in sums else (COUNTS, SUMS)
        raise SourceError(f"{path}: entry {name!r} has {name}{has} but no {name}{lacks}")
    return sorted(sums)


def _read_facts(store: GgufCheckpoint, path: Path) -> tuple[tuple[str, ...], int]:
    for key, kind in ((DATASETS, "[str]"), (CHUNK_COUNT, "u32"), (CHUNK_SIZE, "u32")):
        found = store.metadata.get(key)
        if found is None:
            raise SourceError(f"{path}: the importance matrix has no key {key!r}")
        if found.kind != kind:
            raise SourceError(f"{path}: key {key!r} is of kind {found.kind}; {kind} belongs there")
    datasets = tuple(
        raw if isinstance(raw, str) else raw.decode("utf-8", "replace")
        for raw in store.metadata[DATASETS].value
    )
    return datasets, int(store.metadata[CHUNK_COUNT].value)


def _read_pair(
    store: GgufCheckpoint, name: str, path: Path
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    sums, counts = _floats(store, name, SUMS, path), _floats(store, name, COUNTS, path)
    if sums.size % counts.size:
        raise SourceError(
            f"{path}: entry {name!r} has {sums.size} values for {counts.size} counts, which do "
            "not divide evenly"
        )
    _check_values(sums, name, path)
    _check_values(counts, name + COUNTS, path)
    # Half away from zero, as C's lround; counts are stored as floats but are whole numbers.
    whole = np.floor(counts.astype(np.float64) + 0.5).astype(np.float32)
    return sums.reshape(counts.size, -1), whole


def _read_entry(store: GgufCheckpoint, name: str, path: Path) -> NDArray[np.float32]:
    return shrink(*_read_pair(store, name, path), _enough(store, path))


def _enough(store: GgufCheckpoint, path: Path) -> int:
    found = store.metadata.get(ENOUGH)
    if found is None:
        return 0
    if found.kind != "u32":
        raise SourceError(f"{path}: key {ENOUGH!r} is of kind {found.kind}; u32 belongs there")
    return int(found.value)


def shrink(
    sums: NDArray[np.float32], counts: NDArray[np.float32], enough: int
) -> NDArray[np.float32]:
    """Means of (matrices, columns) ``sums``; ones where nothing was counted at all.

    In a stack, a matrix with ``counts`` below ``enough`` gets the mixture of its own mean and the
    mean over all matrices, its own with the share counts / enough. 0 leaves every mean as it is.
    """
    means = np.ones_like(sums)
    np.divide(sums, counts[:, None], out=means, where=counts[:, None] > 0)
    few = counts < enough
    total = counts.sum(dtype=np.float64)
    if len(counts) > 1 and few.any() and total > 0:
        common = sums.sum(axis=0, dtype=np.float64) / total
        share = (counts[few] / enough)[:, None].astype(np.float64)
        means[few] = (share * means[few] + (1 - share) * common).astype(np.float32)
    return means


def _floats(store: GgufCheckpoint, name: str, suffix: str, path: Path) -> NDArray[np.float32]:
    info = store.tensors[name + suffix]
    if info.dtype != "F32":
        raise SourceError(f"{path}: entry {name!r} has {suffix} in {info.dtype}; F32 belongs there")
    found: NDArray[np.float32] = store.read_rows(info.name, 0, row_count(info.shape))
    return found.reshape(-1)


# ---- the legacy form


def _legacy_entries(file: StoredFile) -> int | None:
    """Declared number of entries, or None when the head cannot be one of this form."""
    head = file.read(0, 8)
    if len(head) < 8:
        return None
    count, length = _I32.unpack_from(head, 0)[0], _I32.unpack_from(head, 4)[0]
    name = file.read(8, max(0, min(length, _LEGACY_NAME_CAP)))
    plausible = count > 0 and 0 < length <= _LEGACY_NAME_CAP and 0 not in name
    # An entry takes a name, two counts and a value, so a larger number cannot be one of entries.
    return count if plausible and count * 17 <= file.size else None


def _read_legacy(path: Path) -> Importance:
    raw, dataset, chunks = _read_legacy_entries(path)
    entries = {name: _mean(values, calls).reshape(1, -1) for name, (values, calls) in raw.items()}
    return Importance(path, entries, (dataset,) if dataset else (), chunks)


def _mean(values: NDArray[np.float32], calls: int) -> NDArray[np.float32]:
    # A signalling NaN warns; whoever checks the result says it.
    with np.errstate(invalid="ignore"):
        return values / np.float32(calls) if calls > 0 else values


def _read_legacy_entries(
    path: Path,
) -> tuple[dict[str, tuple[NDArray[np.float32], int]], str, int]:
    """Values and calls by name, the data set's name and the number of chunks."""
    file = StoredFile(path)
    try:
        number = _legacy_entries(file)
        if number is None:
            raise SourceError(
                f"{path}: is not an importance matrix, neither in the GGUF nor in the legacy form",
                hint=file.hint_for_head(file.read(0, 64))
                or "'quantcli calibrate MODEL --data TEXT' makes one of a text",
            )
        cursor = _LegacyCursor(file)
        entries: dict[str, tuple[NDArray[np.float32], int]] = {}
        for index in range(number):
            name, values, calls = cursor.entry(f"entry {index + 1} of {number}")
            if name in entries:
                raise SourceError(f"{path}: entry {name!r} occurs twice")
            _check_values(_mean(values, calls), name, path)
            entries[name] = values, calls
        chunks, dataset = cursor.tail()
    finally:
        file.close()
    return entries, dataset, chunks


class _LegacyCursor:
    """A position in a legacy file, past the number of entries."""

    def __init__(self, file: StoredFile) -> None:
        self._file = file
        self._at = 4

    def entry(self, what: str) -> tuple[str, NDArray[np.float32], int]:
        """The next entry: its name, mean squares times calls (float32, one axis), and calls."""
        path = self._file.path
        raw = self._bytes(self._integer(f"the name's length of {what}"), f"the name of {what}")
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{path}: the name of {what} is not UTF-8: {raw[:80]!r}") from error
        calls = self._integer(f"the number of calls of {name!r}")
        number = self._integer(f"the number of values of {name!r}")
        if number < 1:
            raise SourceError(f"{path}: entry {name!r} has {number} values")
        raw = self._bytes(4 * number, f"the values of {name!r}")
        return name, np.frombuffer(raw, np.float32).copy(), calls

    def tail(self) -> tuple[int, str]:
        """Number of chunks and name of the data set; both are missing in the oldest files."""
        if self._at == self._file.size:
            return 0, ""
        chunks = self._integer("the number of chunks")
        if self._at == self._file.size:
            return chunks, ""
        dataset = self._bytes(self._integer("the data set's length"), "the data set's name")
        if self._at != self._file.size:
            raise SourceError(
                f"{self._file.path}: {self._file.size - self._at} trailing bytes after the data "
                "set's name"
            )
        return chunks, dataset.decode("utf-8", "replace")

    def _integer(self, what: str) -> int:
        value: int = _I32.unpack(self._bytes(4, what))[0]
        return value

    def _bytes(self, count: int, what: str) -> bytes:
        left = self._file.size - self._at
        if not 0 <= count <= left:
            raise SourceError(
                f"{self._file.path}: ends inside {what}: {count} bytes belong at byte {self._at}, "
                f"{left} are left",
                hint="the file is truncated or not an importance matrix",
            )
        data = self._file.read(self._at, count)
        self._at += count
        return data
