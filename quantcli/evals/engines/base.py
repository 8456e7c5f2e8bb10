"""An engine: something that runs a model on windows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from quantcli.errors import WeightError
from quantcli.evals.scores import Floats
from quantcli.evals.windows import Tokens, Window
from quantcli.model import Model


@dataclass(frozen=True)
class Source:
    """A model to run, and where to find what a GGUF lacks.

    ``folder`` holds config.json and tokenizer.json, as the user named it; ``tokenizer`` is another
    folder (a reference's) whose tokenizer may serve.
    """

    model: Model
    label: str
    folder: Path | None = None
    tokenizer: Path | None = None


class Engine(Protocol):
    """A loaded model."""

    name: str
    """The engine's: "torch", "llama.cpp"."""
    vocabulary: int
    """Length of a row of logits."""
    begin: int | None
    """The token that begins a text, where the vocabulary asks for one."""

    def tokenize(self, text: str, *, spelled: bool = False) -> Tokens:
        """Token ids of a text, the beginning token included where the vocabulary asks for it.

        ``spelled``: control tokens that are written out in it are those tokens.
        """

    def run(self, windows: Sequence[Window]) -> Iterator[Floats]:
        """Each window's logits at the positions that predict its targets, (positions, vocabulary).

        They come in the consecutive blocks of `quantcli.evals.scores.row_blocks`, each valid until
        the next is asked for: of a long context and a large vocabulary all would not fit.
        """

    def close(self) -> None:
        """Let the model go."""


def check_finite(logits: Floats, label: str, window: int, first: int = 0) -> None:
    """WeightError when a logit is not a finite number."""
    if not np.isfinite(logits).all():
        position = first + int(np.isfinite(logits).all(axis=1).argmin())
        raise WeightError(
            f"{label} gives logits that are not finite numbers, first for scored position "
            f"{position + 1} of window {window + 1}",
            hint="'quantcli inspect MODEL --stats' shows broken weights",
        )
