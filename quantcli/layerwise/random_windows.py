"""Windows of random tokens, mixed into the text that a method is fitted to.

Error feedback puts errors into directions that the calibration's inputs hardly have, and a text of
another kind may well have them. Tokens drawn evenly from the vocabulary lead the model through
states that no one text does. With three tenths of them the KL divergence at two bits is a few per
cent larger on text like the calibration's, and a tenth smaller on text of another kind.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from quantcli.layerwise.windows import Ids, Tokenizer, Windows
from quantcli.model import Model

_SEED = 20260101
_LENGTH = 512
_NORMAL = 1
"""llama.cpp's type of tokens that are neither special nor unused."""


def add_random(windows: Windows, model: Model, share: float, other: float = 0.0) -> Windows:
    """``windows`` with as many windows of random tokens behind them as make ``share`` of all.

    ``other`` is the share of those that are still to come.
    """
    count, length = windows.ids.shape
    extra = round(count * share / (1 - share - other))
    if extra == 0:
        return windows
    return replace(windows, ids=np.concatenate([windows.ids, _draw(model, extra, length)]))


def random_windows(model: Model, count: int) -> Windows:
    """Windows of random tokens alone, 512 each unless the model takes fewer.

    ArchitectureError for a model that does not predict the next token.
    """
    model.require_next_token("run layer by layer")
    longest = int(model.value("context_length", 0)) or _LENGTH
    return Windows(_draw(model, count, min(_LENGTH, longest)), ("random tokens",), count)


def usual_tokens(model: Model, vocabulary: int) -> Sequence[int]:
    """The tokens that are neither special nor unused; all where none is said to be usual."""
    types = model.metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return range(vocabulary)
    normal = [i for i, kind in enumerate(types.value) if kind == _NORMAL]
    return [i for i in normal if i < vocabulary] or range(vocabulary)


def _draw(model: Model, count: int, length: int) -> Ids:
    tokenizer = Tokenizer(model)
    allowed = usual_tokens(model, tokenizer.vocabulary)
    # Python's generator draws the same on every version and machine.
    drawn = random.Random(_SEED).choices(allowed, k=count * length)
    ids = np.array(drawn, np.int32).reshape(count, length)
    if tokenizer.bos is not None:
        ids[:, 0] = tokenizer.bos
    return ids
