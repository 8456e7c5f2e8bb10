"""Texts in: plain files, JSON lines, standard input, and the text that comes with quantcli.

A text is what it would be for llama.cpp: one trailing newline is dropped. Line ends of Windows are
read as newlines, as text files are there, with a remark: a model has hardly ever seen others.
The documents of JSON lines follow one another, an empty line between them; lines with "messages"
are conversations, which the model's own chat template makes a text of. Of a Parquet file a column
is taken. Refused: invalid UTF-8
and empty texts, since either means that something else was meant.
"""

from __future__ import annotations

import io
import json
import os
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantcli.errors import MissingExtraError, SourceError, UsageError
from quantcli.layerwise.built_in import CONVERSATIONS, KINDS, write_plainly
from quantcli.layerwise.dataset_texts import is_dataset, read_dataset
from quantcli.systems import CLOEXEC, NONBLOCK
from quantcli.types import MetaValue
from quantcli.vocab.chat_template import Conversation, render_conversations

STDIN = "-"
BUILT_IN, DEFAULT = "built-in", "default"
"""Names of what comes with quantcli, where no file is called so: English prose, and the mix of all
kinds; ``built-in/KIND`` is one of them."""
_LINES = (".jsonl", ".ndjson")
_TABLES = (".parquet",)
_MESSAGES = "messages"
_BETWEEN = "\n\n"
_FIRST_LOOK = (
    "the built-in prose is from old books that most models have read, and what was calibrated on "
    "it looks better on it than elsewhere: good for a first look, not for a figure to publish"
)
_WRITER_SECONDS = 5.0
"""What a FIFO's writer may take to open it."""
_PAUSE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Text:
    """A text, what to call it, and its share when windows are chosen (None: all of it)."""

    label: str
    content: str
    weight: float | None = None
    remark: str | None = None
    """What the user should know of how it was read."""
    spelled: bool = False
    """Whether control tokens in it are to be read as such."""
    conversations: tuple[Conversation, ...] = ()
    """In place of ``content``: what a chat template makes a text of."""
    plain: str | None = None
    """What conversations are to a model whose template does not take them, if that is no error."""

    @property
    def nbytes(self) -> int:
        """Bytes of the text; of conversations their words'."""
        words = [str(m.get("content") or "") for said in self.conversations for m in said]
        return len(self.content.encode()) + sum(len(each.encode()) for each in words)

    def render(self, metadata: Mapping[str, MetaValue]) -> Text:
        """The text for a model with these key-values: conversations through its chat template.

        What it gives has ``spelled`` set: control tokens are spelled out in it.
        """
        if not self.conversations:
            return self
        try:
            content = render_conversations(metadata, self.conversations, self.label)
        except SourceError:
            if self.plain is None:
                raise
            remark = f"{self.label} become plain paragraphs: the model has no template for them"
            return replace(self, content=self.plain, conversations=(), remark=remark)
        return replace(self, content=content, conversations=(), spelled=True)


def built_in(kind: str = "prose", weight: float | None = None) -> Text:
    """A text that comes with quantcli; UsageError for a kind that there is not."""
    if kind not in KINDS:
        raise UsageError(
            f"no built-in text is called {kind!r}",
            hint=f"one of: {', '.join(f'{BUILT_IN}/{name}' for name in KINDS)}",
        )
    found = KINDS[kind]
    if kind != CONVERSATIONS:
        return Text(found.label, found.read().removesuffix("\n"), weight)
    said = found.conversations()
    plain = _BETWEEN.join(map(write_plainly, said))
    return Text(found.label, "", weight, conversations=said, plain=plain)


def default_mix(weight: float = 1.0) -> list[Text]:
    """All kinds in their shares of ``weight``: a start where there is no text like that which the
    model will see.
    """
    whole = sum(kind.share for kind in KINDS.values())
    return [built_in(name, weight * kind.share / whole) for name, kind in KINDS.items()]


def read_texts(names: Sequence[str], *, field: str | None = None) -> list[Text]:
    """Read ``FILE``, ``FILE:WEIGHT`` or ``-`` each; the default mix when there are none.

    ``field`` is the key of a text in JSON lines, "text" unless given; standard input is taken as
    JSON lines when it is. SourceError or UsageError when a text cannot be used.
    """
    if not names:
        return default_mix()
    if sum(_split(name)[0] == STDIN for name in names) > 1:
        raise UsageError("standard input can be read only once", hint="give '-' once")
    texts = [text for name in names for text in _read(name, field)]
    weighted = [text for text in texts if text.weight is not None]
    if weighted and len(weighted) < len(texts):
        bare = next(text.label for text in texts if text.weight is None)
        raise UsageError(
            f"{bare} has no weight and {weighted[0].label} has one",
            hint=f"weigh all or none, for example {bare}:1",
        )
    return texts


def _split(name: str) -> tuple[str, float | None]:
    """The file and its weight; a file that is really called so wins over the reading as weight."""
    stem, colon, tail = name.rpartition(":")
    if not colon or not stem or Path(name).exists():
        return name, None
    try:
        weight = float(tail)
    except ValueError:
        return name, None
    if not 0 < weight < float("inf"):
        raise UsageError(f"the weight {tail} of {stem} is not a positive number")
    return stem, weight


def _read(name: str, field: str | None) -> list[Text]:
    file, weight = _split(name)
    if Path(file).exists():
        return [_read_one(file, weight, field)]
    if file == DEFAULT:
        return default_mix(1.0 if weight is None else weight)
    head, _, kind = file.partition("/")
    if head == BUILT_IN:
        found = built_in(kind or "prose", weight)
        return [replace(found, remark=_FIRST_LOOK) if not kind else found]
    if is_dataset(file):
        rows = read_dataset(file, field)
        found_rows = [_document(row, f"{file}, row {n}") for n, row in enumerate(rows, 1)]
        return [_of_documents(found_rows, file, field, weight)]
    return [_read_one(file, weight, field)]


def _read_one(file: str, weight: float | None, field: str | None) -> Text:
    if file == STDIN:
        label, raw = "standard input", sys.stdin.buffer.read()
        lines = field is not None
    else:
        path = Path(file)
        if path.is_dir():
            raise SourceError(f"{path} is a folder", hint="name a text file")
        if not path.exists():
            raise SourceError(
                f"{path}: there is no such file",
                hint="check the path; a data set is NAME:CONFIG:SPLIT",
            )
        label, raw = str(path), _read_file(path)
        lines = path.suffix.lower() in _LINES
        if path.suffix.lower() in _TABLES:
            return _of_documents(read_column(path, field), label, field, weight)
        if field is not None and not lines:
            raise UsageError(
                f"--field {field} is for JSON lines, and {label} is plain text",
                hint=f"a name that ends in {' or '.join(_LINES)} says what the file is",
            )
    content = _decode(raw, label)
    if lines:
        return _of_documents(_documents(content, label, field), label, field, weight)
    remark, ends = None, content.count("\r\n")
    if ends:
        content = content.replace("\r\n", "\n")
        remark = f"{label} has {ends} line ends of Windows (CRLF), which are read as newlines"
    content = content.removesuffix("\n")
    if not content.strip():
        raise SourceError(f"{label} is empty", hint="give a text of some thousand words")
    return Text(label, content, weight, remark)


def _read_file(path: Path) -> bytes:
    """The bytes of a file, or of a FIFO that somebody writes to; SourceError for other nodes."""
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFIFO) and not path.samefile(os.devnull):
        raise SourceError(f"{path} is no file of text", hint="name a text file")
    if kind != stat.S_IFIFO:
        return path.read_bytes()
    # Opened otherwise, a FIFO without a writer waits for ever; like this it is as if empty.
    descriptor = os.open(path, os.O_RDONLY | CLOEXEC | NONBLOCK)
    with io.FileIO(descriptor) as file:
        deadline = time.monotonic() + _WRITER_SECONDS
        while (first := file.read(1)) == b"" and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)
        if first == b"":
            raise SourceError(f"{path} is a FIFO that nobody writes to")
        os.set_blocking(descriptor, True)
        return (first or b"") + file.read()


def _decode(raw: bytes, label: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{label} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}",
            hint="it is a model; texts are given with --data or --calibrate"
            if raw.startswith(b"GGUF")
            else "convert it, for example with iconv -t utf-8",
        ) from error


def _of_documents(
    found: Sequence[str | Conversation], label: str, field: str | None, weight: float | None
) -> Text:
    """Texts or conversations, one after the other."""
    texts = tuple(each for each in found if isinstance(each, str))
    conversations = tuple(each for each in found if not isinstance(each, str))
    if texts and conversations:
        raise SourceError(
            f"{label} holds texts and conversations", hint="--field names the key to take"
        )
    content = _BETWEEN.join(texts).removesuffix("\n")
    if not conversations and not content.strip():
        raise SourceError(f"{label} is empty", hint="give a text of some thousand words")
    return Text(label, content, weight, conversations=conversations)


def read_column(path: Path, field: str | None) -> list[str | Conversation]:
    """Texts or conversations of a Parquet file's column; MissingExtraError without pyarrow."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MissingExtraError(
            f"{path}: reading Parquet needs pyarrow", hint="pip install pyarrow"
        ) from None
    try:
        names = parquet.read_schema(path).names
        chosen = field or next((name for name in ("text", _MESSAGES) if name in names), "text")
        if chosen not in names:
            raise SourceError(
                f"{path} has no column {chosen!r}", hint=f"--field names one of: {', '.join(names)}"
            )
        column = parquet.read_table(path, columns=[chosen]).column(0).to_pylist()
    except (ArrowException, OSError) as error:
        raise SourceError(f"{path}: is not a Parquet file: {error}") from error
    return [_document(value, f"{path}, row {number}") for number, value in enumerate(column, 1)]


def _document(value: Any, where: str) -> str | Conversation:
    """A text, or a conversation that is checked."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        for each in value:
            if not isinstance(each.get("role"), str):
                raise SourceError(f"{where}: a message has no role")
        return value
    raise SourceError(f"{where}: holds neither a text nor messages")


def _documents(content: str, label: str, field: str | None) -> list[str | Conversation]:
    found: list[str | Conversation] = []
    # Unlike splitlines, which also cuts at separators that JSON strings may hold.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise SourceError(
                f"{label}, line {number}: is not JSON ({error})",
                hint="mend the line, or give plain text under a name that ends in .txt",
            ) from error
        if not isinstance(value, dict):
            raise SourceError(f"{label}, line {number}: is not a JSON object")
        key = field or ("text" if "text" in value or _MESSAGES not in value else _MESSAGES)
        document = value.get(key)
        if isinstance(document, list):
            document = _document(document, f"{label}, line {number}")
        elif not isinstance(document, str):
            keys = ", ".join(sorted(k for k, v in value.items() if isinstance(v, str)))
            raise SourceError(
                f"{label}, line {number}: has no text under {key!r}",
                hint=f"--field names one of: {keys}" if keys else "no key of it holds a text",
            )
        found.append(document)
    return found
