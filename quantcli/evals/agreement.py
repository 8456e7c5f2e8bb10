"""What models must agree on before their predictions can be compared: vocabulary and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantcli.errors import SourceError, VocabularyError
from quantcli.evals.artifacts import EvaluatedModel
from quantcli.evals.bases.file import BaseFile
from quantcli.evals.engines.base import Engine
from quantcli.evals.windows import Tokens
from quantcli.layerwise.texts import Text


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in its engine."""

    artifact: EvaluatedModel
    engine: Engine


def common_tokens(
    models: Sequence[Loaded], text: Text | None, base: BaseFile | None, context: int
) -> Tokens:
    """The tokens of ``text`` for all models, or those of ``base``, which the text must agree with.

    Raises VocabularyError when two models differ, SourceError when the base is of another text.
    """
    first = models[0]
    size = base.header.vocabulary if base else first.engine.vocabulary
    other = str(base.path) if base else first.artifact.label
    for model in models:
        if model.engine.vocabulary != size:
            raise VocabularyError(
                f"{model.artifact.label} has a vocabulary of {model.engine.vocabulary} tokens and "
                f"{other} one of {size}, so their predictions cannot be compared",
                hint="a base is the same model before it was quantized",
            )
    if text is None:
        return base.header.tokens if base else np.empty(0, np.int32)
    text = text.render(first.artifact.model.metadata)
    tokens = first.engine.tokenize(text.content, spelled=text.spelled)
    for model in models[1:]:
        other_tokens = model.engine.tokenize(text.content, spelled=text.spelled)
        if not np.array_equal(tokens, other_tokens):
            raise VocabularyError(
                f"{model.artifact.label} cuts {text.label} into other tokens than "
                f"{first.artifact.label}, so their predictions cannot be compared",
                hint="a base is the same model before it was quantized",
            )
    if base is not None:
        _check_text(tokens, text, base, context)
    return tokens


def _check_text(tokens: Tokens, text: Text, base: BaseFile, context: int) -> None:
    held = base.header.chunks * context
    if not np.array_equal(tokens[:held], base.header.tokens):
        raise SourceError(
            f"{base.path} was made with another text than {text.label}",
            hint="leave --data out, and the base's own text is taken",
        )
