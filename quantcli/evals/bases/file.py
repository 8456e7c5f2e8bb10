"""The file around the rows: header, tokens, then each window's scored positions in order.

Little-endian, as llama.cpp writes it: eight letters that tell the layout, int32 context,
vocabulary and number of windows (and, in the compact layout, how many tokens a row keeps), the
text's tokens as int32 (before any is replaced by the beginning token), and context-1-context//2
rows for each window. Every length follows from the header, so a file that was cut short is
refused before any model runs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.atomic import AtomicFiles
from quantcli.errors import SourceError, UsageError
from quantcli.evals.bases import llama, topk
from quantcli.evals.scores import Base, Floats, Ids
from quantcli.evals.windows import Tokens

_DEEPEST, _SLACK = 1e5, 0.01
"""Of a log-probability, in nats, and what rounding may add to one."""
_LARGEST = 1 << 24
"""Of a context, a vocabulary and a row: far beyond any model."""


@dataclass(frozen=True)
class BaseHeader:
    """What a base file is about. ``kept`` is the tokens of a compact row, None for llama.cpp's."""

    context: int
    vocabulary: int
    chunks: int
    tokens: Tokens
    kept: int | None = None

    @property
    def rows(self) -> int:
        """Scored positions of a window."""
        return self.context - 1 - self.context // 2

    @property
    def row_type(self) -> np.dtype[Any]:
        """A row's fields."""
        return llama.row_type(self.vocabulary) if self.kept is None else topk.row_type(self.kept)

    def pack(self) -> bytes:
        """The file up to the first row."""
        magic = llama.MAGIC if self.kept is None else topk.MAGIC
        sizes = [self.context, self.vocabulary, self.chunks]
        if self.kept is not None:
            sizes.append(self.kept)
        return magic + struct.pack(f"<{len(sizes)}i", *sizes) + self.tokens.astype("<i4").tobytes()

    def encode(self, logits: Floats, targets: Ids) -> NDArray[Any]:
        """One window's rows."""
        if self.kept is None:
            return llama.encode(logits, targets)
        return topk.encode(logits, targets, self.kept)

    def measure(self, rows: NDArray[Any]) -> tuple[list[Floats], list[Floats]]:
        """What of the rows are log-probabilities, and what are probabilities."""
        if self.kept is None:
            return [rows["lowest"], llama.largest(rows)], []
        return [rows[name] for name in ("target", "log_probs", "other_plogp")], [rows["other"]]

    def decode(self, rows: NDArray[Any]) -> Base:
        """One window's rows as something to compare with."""
        return llama.LlamaBase(rows, self.vocabulary) if self.kept is None else topk.TopBase(rows)


class BaseWriter(AbstractContextManager["BaseWriter"]):
    """Writes a base file window by window; nothing has its name until `publish`."""

    def __init__(self, path: Path, header: BaseHeader, *, force: bool = False) -> None:
        if header.kept is not None and not 0 < header.kept <= header.vocabulary:
            raise UsageError(
                f"{header.kept} tokens a row cannot be kept of a vocabulary of {header.vocabulary}"
            )
        self._path, self._header = path, header
        head = header.pack()
        each = header.rows * header.row_type.itemsize
        self._files = AtomicFiles({path: len(head) + header.chunks * each}, force=force)
        self._head, self._place = head, len(head)

    def __enter__(self) -> Self:
        self._files.__enter__()
        self._files.write(self._path, 0, self._head)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def add(self, logits: Floats, targets: Ids) -> None:
        """Append a block of scored positions."""
        rows = self._header.encode(logits, targets).tobytes()
        self._files.write(self._path, self._place, rows)
        self._place += len(rows)

    def publish(self) -> None:
        """Give the whole file its name."""
        self._files.publish()


class BaseFile:
    """An opened base file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header, self._start = _read_header(path)

    @contextmanager
    def reading(self) -> Iterator[BaseReader]:
        """Read its rows from the first on."""
        with self.path.open("rb") as file:
            file.seek(self._start)
            yield BaseReader(self, file)

    def checked(self, raw: bytes, rows: int) -> NDArray[Any]:
        """Rows out of the file's bytes; SourceError for what cannot be probabilities."""
        kind = self.header.row_type
        if len(raw) < rows * kind.itemsize:
            raise SourceError(f"{self.path} was cut short while it was read")
        return self._checked(np.frombuffer(raw, kind))

    def _checked(self, rows: NDArray[Any]) -> NDArray[Any]:
        floats = [n for n in rows.dtype.names or () if rows.dtype[n].base == np.dtype("<f4")]
        if not all(np.isfinite(rows[name]).all() for name in floats):
            raise SourceError(f"{self.path} holds log-probabilities that are not finite numbers")
        log_probs, probs = self.header.measure(rows)
        if not (_within(log_probs, -_DEEPEST, 0) and _within(probs, 0, 1)):
            raise SourceError(f"{self.path} holds values that are no log-probabilities")
        if self.header.kept is not None and rows["ids"].max() >= self.header.vocabulary:
            raise SourceError(f"{self.path} holds a token beyond its vocabulary")
        return rows


class BaseReader:
    """Where a base file is read from, block after block of its scored positions."""

    def __init__(self, base: BaseFile, file: BinaryIO) -> None:
        self._base, self._file = base, file

    def read(self, rows: int) -> Base:
        """The next positions' base."""
        header = self._base.header
        raw = self._file.read(rows * header.row_type.itemsize)
        return header.decode(self._base.checked(raw, rows))


def _within(parts: list[Floats], low: float, high: float) -> bool:
    return all(((low <= part) & (part <= high + _SLACK)).all() for part in parts)


def _read_header(path: Path) -> tuple[BaseHeader, int]:
    if not path.is_file():
        raise SourceError(f"{path}: there is no such file", hint="--save-base writes one")
    with path.open("rb") as file:
        magic = file.read(8)
        if magic not in (llama.MAGIC, topk.MAGIC):
            raise SourceError(
                f"{path} is not a file of base log-probabilities",
                hint="--save-base writes one, and so does llama-perplexity --save-all-logits",
            )
        count = 4 if magic == topk.MAGIC else 3
        raw = file.read(4 * count)
        if len(raw) < 4 * count:
            raise SourceError(f"{path} ends within its header")
        context, vocabulary, chunks, *rest = struct.unpack(f"<{count}i", raw)
        kept = rest[0] if rest else None
        sizes = (context, vocabulary, chunks, *rest)
        if min(sizes) < 1 or context < 4 or max(context, vocabulary, *rest) > _LARGEST:
            shown = ", ".join(map(str, sizes))
            raise SourceError(f"{path} has impossible sizes in its header: {shown}")
        start = 8 + 4 * count + 4 * context * chunks
        header = BaseHeader(context, vocabulary, chunks, np.empty(0, np.int32), kept)
        expected = start + chunks * header.rows * header.row_type.itemsize
        found = path.stat().st_size
        if found != expected:
            raise SourceError(
                f"{path} has {found} bytes, but its header makes it {expected}",
                hint="the run that wrote it did not finish",
            )
        tokens = np.frombuffer(file.read(4 * context * chunks), "<i4").astype(np.int32)
    return BaseHeader(context, vocabulary, chunks, tokens, kept), start
