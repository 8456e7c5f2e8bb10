"""Windows that the unquantized model writes itself, mixed into the text that a method is fitted to.

What a model writes at temperature 1 is what it takes for likely, of every kind that it was trained
on and not of one text's alone, and there is as much of it as one asks for. Training on the output
of the model is LLM-QAT's (arXiv:2305.17888). Each window starts with BOS, where the model has one,
and a token drawn evenly from the vocabulary; the rest is drawn from the model's own predictions,
the end of a text being a token like any other.

All weights are in memory while it writes. On the CPU the draws do not depend on the number of
threads; the windows of a batch are drawn together, with a seed of their own, so the batch is a
constant and several processes can share the batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from quantcli.errors import ArchitectureError
from quantcli.events import Events
from quantcli.layerwise.layerwise_model import LayerwiseModel
from quantcli.layerwise.random_windows import usual_tokens
from quantcli.layerwise.steady import steady
from quantcli.layerwise.windows import Ids, Tokenizer
from quantcli.model import Model
from quantcli.types import Progress

BATCH = 32
"""Windows that are written together."""
_SEED = 20260104
_UNFIT = (TypeError, ValueError, IndexError, AttributeError, RuntimeError, NotImplementedError)
"""What a module raises that cannot go on from the tokens before."""


def write_samples(
    model: Model, layers: LayerwiseModel, count: int, length: int, *, first: int = 0, every: int = 1
) -> Events[Ids]:
    """``count`` windows of ``length`` tokens, int32, that ``layers`` of ``model`` write.

    Only each of ``every`` batches from the ``first`` on is written; the others' windows are zeros.
    Yields progress. ArchitectureError for a model that transformers does not generate with.
    """
    tokenizer = Tokenizer(model)
    normal = usual_tokens(model, tokenizer.vocabulary)
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    found = np.zeros((count, length), np.int32)
    names = [*layers.outside_layers(), *layers.tables, layers.head_name]
    for index in range(len(layers.layers)):
        names += layers.layer_parameters(index)
    total = count * length
    with layers.filled(list(dict.fromkeys(names))):
        for start in range(first * BATCH, count, every * BATCH):
            part = slice(start, start + BATCH)
            size = len(found[part])
            draw = torch.Generator().manual_seed(_SEED + start)
            word = torch.tensor(normal)[torch.randint(len(normal), (size, 1), generator=draw)]
            tokens = torch.cat([torch.tensor([begin] * size, dtype=torch.int64), word], dim=1)
            for ids in _continue(layers, tokens, length, draw):
                tokens = ids
                done = start * length + tokens.numel()
                yield Progress(done, total, "own windows", "tokens")
            found[part] = tokens.numpy()
    return found


def _continue(
    layers: LayerwiseModel, tokens: torch.Tensor, length: int, draw: torch.Generator
) -> Iterator[torch.Tensor]:
    """Tokens (windows, n) with ever more behind them, up to ``length``."""
    cache, fresh = None, tokens
    while tokens.shape[1] < length:
        logits, cache = _predict(layers, fresh, cache)
        chances = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
        aims = torch.rand((len(tokens), 1), generator=draw, dtype=torch.float64) * chances[:, -1:]
        fresh = torch.searchsorted(chances, aims, right=True).clamp(max=chances.shape[1] - 1)
        tokens = torch.cat([tokens, fresh], dim=1)
        yield tokens


@torch.no_grad()
@steady()
def _predict(layers: LayerwiseModel, fresh: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """Logits (windows, vocabulary) after the ``fresh`` tokens, and the cache with them in it."""
    given = {} if cache is None else {"past_key_values": cache}
    reason: BaseException | None = None
    try:
        result = layers.module(input_ids=fresh.to(layers.device), use_cache=True, **given)
        found = getattr(result, "past_key_values", None)
    except torch.OutOfMemoryError:
        raise
    except _UNFIT as unfit:
        reason, found = unfit, None
    if found is None:
        raise ArchitectureError(
            f"{type(layers.module).__name__} cannot write a text: "
            f"{reason or 'it keeps nothing of the tokens before'}",
            hint="--sample-share 0 calibrates without the model's own samples",
        ) from reason
    return result.logits[:, -1].float().cpu(), found
