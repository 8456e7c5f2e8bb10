"""How a text is cut and scored: llama-perplexity's windows, and sliding ones.

A text is tokenized whole and cut into windows that do not overlap; the second half of each is
scored, so that every scored token has at least half a window before it. With a stride, windows
overlap by the rest and each token after the first half window is scored exactly once, the last
ones by a window that ends with the text. The first token of each window is replaced by the
beginning token where the vocabulary has one (llama.cpp does this with a stride too late to have
an effect).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError, UsageError

Tokens = NDArray[np.int32]

SHORTEST = 16
"""Tokens of a window, at least: fewer say nothing about a model."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens to run; the logits from position ``first`` on predict ``targets``."""

    tokens: Tokens
    first: int
    targets: NDArray[np.int64]

    @property
    def last(self) -> int:
        """The position after the last whose logits are wanted."""
        return self.first + len(self.targets)


def check_lengths(context: int, stride: int | None) -> None:
    """UsageError for lengths that make no windows."""
    if context < SHORTEST:
        raise UsageError(f"a context of {context} tokens is too short", hint="--ctx 512 is usual")
    if stride is not None and not 0 < stride < context:
        raise UsageError(
            f"a stride of {stride} is not between 0 and the context of {context}",
            hint=f"--stride {context // 2} is usual",
        )


def cut(
    tokens: Tokens,
    context: int,
    *,
    begin: int | None,
    chunks: int | None = None,
    stride: int | None = None,
    name: str = "the text",
    least: int = 2,
) -> Sequence[Window]:
    """Windows of ``context`` tokens over a text; SourceError when there are too few."""
    check_lengths(context, stride)
    if len(tokens) < least * context:
        raise SourceError(
            f"{name} is too short: {len(tokens)} tokens, but {least} windows of {context} tokens "
            "are needed",
            hint="give a longer text or a smaller --ctx",
        )
    most = None if chunks is None else min(chunks, len(tokens))
    spans = _sliding(len(tokens), context, stride) if stride else _halves(len(tokens), context)
    return [_window(tokens[a : a + context], first, begin) for a, first in islice(spans, most)]


def _halves(length: int, context: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length - context + 1, context):
        yield start, context // 2


def _sliding(length: int, context: int, stride: int) -> Iterator[tuple[int, int]]:
    scored, start = context // 2 + 1, 0
    while scored < length:
        start = min(start, length - context)
        yield start, scored - 1 - start
        scored = start + context
        start += stride


def _window(tokens: Tokens, first: int, begin: int | None) -> Window:
    targets = tokens[first + 1 :].astype(np.int64)
    if begin is not None:
        tokens = tokens.copy()
        tokens[0] = begin
    return Window(tokens, first, targets)
