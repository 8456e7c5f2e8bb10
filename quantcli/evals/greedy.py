"""Greedy agreement: how long a model says what the base would say.

The base continues the first half of some windows, always with its likeliest token. Each model then
reads these continuations, and at every position its own likeliest token is held against the base's.
Up to the first that differs, this is what the model would have written itself; so the same run
tells how many tokens both write alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from quantcli.evals.engines.base import Engine
from quantcli.evals.summary import Estimate, mean_of
from quantcli.evals.windows import Tokens, Window

MOST_PROMPTS = 16
"""Continuations of a text."""


@runtime_checkable
class Extends(Protocol):
    """An engine that writes on without reading everything again for each token."""

    def extend(self, prompt: Tokens, count: int) -> Tokens:
        """The ``count`` likeliest tokens after ``prompt``, one by one."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the base writes after a prompt."""

    prompt: Tokens
    written: Tokens

    @property
    def window(self) -> Window:
        """The positions that predict what was written."""
        tokens = np.concatenate([self.prompt, self.written[:-1]])
        return Window(tokens, len(self.prompt) - 1, self.written.astype(np.int64))


@dataclass(frozen=True, slots=True)
class Greedy:
    """A model on the base's continuations; the errors are over continuations.

    ``agreement`` is the share of the positions at which both prefer the same token, ``alike`` the
    mean number of tokens before the first that differs, ``whole`` the share of continuations
    without any.
    """

    prompts: int
    tokens: int
    agreement: Estimate
    alike: Estimate
    whole: Estimate


def continue_windows(engine: Engine, windows: Sequence[Window], count: int) -> list[Continuation]:
    """What ``engine`` writes after the first half of the first windows, ``count`` tokens each."""
    prompts = [window.tokens[: len(window.tokens) // 2] for window in windows[:MOST_PROMPTS]]
    if isinstance(engine, Extends):
        return [Continuation(prompt, engine.extend(prompt, count)) for prompt in prompts]
    written = [np.empty(0, np.int32) for _ in prompts]
    for _ in range(count):
        so_far = [np.concatenate(pair) for pair in zip(prompts, written, strict=True)]
        # The target is only there to ask for the last position's logits.
        asked = [Window(ids, len(ids) - 1, np.zeros(1, np.int64)) for ids in so_far]
        tops = [int(logits[0].argmax()) for logits in engine.run(asked)]
        written = [np.append(w, np.int32(top)) for w, top in zip(written, tops, strict=True)]
    return [Continuation(*pair) for pair in zip(prompts, written, strict=True)]


def follow(engine: Engine, continuations: Sequence[Continuation]) -> Greedy:
    """Let a model read what the base wrote."""
    windows = [each.window for each in continuations]
    runs, same = engine.run(windows), []
    for window in windows:
        tops: list[NDArray[np.int64]] = []
        # A long row of logits comes in blocks.
        while sum(map(len, tops)) < len(window.targets):
            tops.append(next(runs).argmax(axis=1))
        same.append(np.concatenate(tops) == window.targets)
    hits = np.array(same)
    whole = hits.all(axis=1)
    alike = np.where(whole, hits.shape[1], hits.argmin(axis=1))
    shares = hits.mean(axis=1)
    agreement, length, all_of_it = (
        mean_of(np.asarray(each, np.float64)) for each in (shares, alike, whole)
    )
    return Greedy(len(hits), hits.shape[1], agreement, length, all_of_it)
