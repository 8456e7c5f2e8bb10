"""Gradients of the model's predictions by every layer's input, and what they say of the embedding.

To second order the KL divergence caused by a small error e in a hidden state is ``e^T F e / 2``
with the Fisher information F, the mean of g g^T over gradients g of the log-likelihood of tokens
drawn from the model itself (Amari's natural metric; used for rounding in YAQA, arXiv:2505.22988).
So F is to a row of the embedding what x x^T is to a row of a linear layer, and error feedback
applies to it in the same way. The gradients come from a backward pass that fills one layer at a
time and stay in a file, from which each layer's own outputs get theirs when its turn comes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from quantcli.artifacts.scratch import ArrayFile
from quantcli.artifacts.staging import naming
from quantcli.layerwise.hidden_states import LayerInputs
from quantcli.layerwise.layerwise_model import LayerwiseModel, gradient_of
from quantcli.layerwise.steady import steady
from quantcli.layerwise.walk import LayerPass, LayerWalk
from quantcli.ranks.group import Group
from quantcli.statistics.output_fisher import LayerFisher, OutputFisher, StackShape
from quantcli.statistics.router_flips import RouterFlips
from quantcli.types import Event, OutputTensor

_HELD_OUT = 4
"""Every so many windows one is kept from the fit."""
FEWEST = 16
"""Windows that the embedding needs in any case."""
MORE = 4
"""An expert gets a share of the tokens, so its gradients take more windows."""
EMBEDDING_DAMPING = 0.1
"""Of the embedding's Fisher information, as a fraction of its mean diagonal."""
_SEED = 20260101
_LOGITS = 1 << 23
"""Logits that are there at once, each several times over: as chances, their gradients and so on."""


@dataclass
class EmbeddingFisher:
    """Means of g g^T at the embedding's output: fitted, and held out."""

    fit: NDArray[np.float64]
    held_out: NDArray[np.float64]


@dataclass
class LayerGradients:
    """Gradients by the inputs of all layers and by the last one's output, in a file of ``folder``.

    ``numbers`` are the windows of the run that they belong to, ``places`` their places among those
    of all ranks (None: they are all).
    """

    folder: Path
    numbers: tuple[int, ...]
    places: tuple[int, ...] | None = None
    _values: ArrayFile | None = None

    def open(self, shape: tuple[int, ...]) -> bool:
        """Take the file of an earlier run, if it is whole and as large as (layers + 1, windows,
        tokens, size) values."""
        try:
            known = bool(json.loads(self._mark.read_text()) == [*self.numbers, *shape])
        except (OSError, ValueError):
            return False
        if known:
            self._values = ArrayFile.open(self._path, np.float32, shape)
        return known

    def create(self, shape: tuple[int, ...]) -> ArrayFile:
        """A new file; `finish` makes it count."""
        self._mark.unlink(missing_ok=True)
        self._values = ArrayFile.create(self._path, np.float32, shape)
        return self._values

    def finish(self, variance: NDArray[np.float64]) -> None:
        """The values are whole; ``variance`` is what the property of that name will be."""
        values = self._known
        with naming(self.folder / "variance.npy"):
            np.save(self.folder / "variance.npy", variance)
        values.flush()
        with naming(self._mark):
            self._mark.write_text(json.dumps([*self.numbers, *values.shape]))

    def of(self, layer: int, model: LayerwiseModel) -> Iterator[torch.Tensor]:
        """Each window's gradient (1, tokens, size) by the output of ``layer``."""
        values = self._known
        for window in range(values.shape[1]):
            gradient = torch.from_numpy(values[layer + 1, window]).unsqueeze(0)
            yield gradient.to(model.device, model.dtype)

    def embedding(self, streams: int, group: Group | None = None) -> EmbeddingFisher:
        """Means at the embedding's output, the first of a state's ``streams``, over all ranks."""
        values = self._known
        size = values.shape[-1] // streams
        sums, counts = np.zeros((2, size, size)), [0, 0]
        for window, number in enumerate(self.places or range(values.shape[1])):
            rows = values[0, window][:, :size]
            apart = number % _HELD_OUT == _HELD_OUT - 1
            sums[int(apart)] += rows.T @ rows
            counts[apart] += len(rows)
        if group is not None:
            group.add_up(sums)
            counts = [sum(each) for each in zip(*group.gather(counts), strict=True)]
        fit = sums[0] / max(1, counts[0])
        return EmbeddingFisher(fit, sums[1] / counts[1] if counts[1] else fit.copy())

    @property
    def variance(self) -> NDArray[np.float64]:
        """For each token of the vocabulary the mean of p (1 - p), p its probability."""
        found: NDArray[np.float64] = np.load(self.folder / "variance.npy")
        return found

    @property
    def _known(self) -> ArrayFile:
        if self._values is None:
            raise ValueError("there are no gradients")
        return self._values

    @property
    def _path(self) -> Path:
        return self.folder / "gradients.f32"

    @property
    def _mark(self) -> Path:
        return self.folder / "gradients.json"


def count_windows(asked: int, tensors: Iterable[str]) -> int:
    """Windows to go backwards; `MORE` times those asked for where ``tensors`` have experts."""
    mixture = any(name.endswith("_exps.weight") for name in tensors)
    return max(asked * (MORE if mixture else 1), FEWEST)


def choose_windows(count: int, most: int) -> tuple[int, ...]:
    """Numbers of at most ``most`` of ``count`` windows, evenly spread."""
    return tuple(int(n) for n in np.unique(np.linspace(0, count - 1, min(most, count)).round()))


def measure_gradients(
    model: LayerwiseModel, ids: NDArray[np.int32], found: LayerGradients
) -> Iterator[Event]:
    """Fill ``found`` from its windows among ``ids`` (n, tokens)."""
    count = len(found.numbers)
    shape = (len(model.layers) + 1, count, ids.shape[1], model.hidden_size)
    if found.open(shape):
        return
    states = LayerInputs(found.create(shape), model.dtype)
    walk = LayerWalk(
        model, ids[list(found.numbers)], states, label=None, task="sensitivity, ", passes=2
    )
    yield from walk.forward()
    draw = torch.Generator().manual_seed(_SEED)
    variance: NDArray[np.float64] = np.zeros(model.vocabulary)
    with walk.head(weights=True):
        turn = 0
        for window, place in zip(walk.windows, found.places or range(count), strict=True):
            _skip_draws(draw, place - turn, (ids.shape[1], model.vocabulary))
            turn = place + 1
            gradient, varied = _output_gradient(model, walk.get(window), draw)
            states.replace(window, gradient)
            variance += varied / count
    yield from walk.backward(lambda layer: layer.backward(RouterFlips(layer)))
    found.finish(variance)


def embedding_fisher(
    model: LayerwiseModel, window: NDArray[np.int32], gradients: LayerGradients,
    group: Group | None = None,
) -> EmbeddingFisher:  # fmt: skip
    """How much directions of the embedding matter, in units of its rows."""
    fisher = gradients.embedding(model.streams, group)
    scale = model.embedding_scale(window) ** 2
    return EmbeddingFisher(fisher.fit * scale, fisher.held_out * scale)


def measure_output_fisher(
    layer: LayerPass, gradients: Iterable[tuple[int, torch.Tensor]],
    tensors: Iterable[OutputTensor], folder: Path,
    make: Callable[..., OutputFisher] = OutputFisher,
) -> LayerFisher:  # fmt: skip
    """Of ``tensors``, from gradients by the layer's output in some windows.

    ``folder`` takes sums of stacks until it is closed. Numbers of windows are the walk's.
    """
    shapes = {t.name: StackShape.of(t) for t in tensors if len(t.shape) > 1}
    found = LayerFisher(layer.walk.model.parameters.outputs, shapes, folder, make)

    def passing() -> Iterator[tuple[int, torch.Tensor]]:
        for found.window, gradient in gradients:
            yield found.window, gradient

    layer.observe_gradients(passing(), found.observe, RouterFlips(layer))
    return found


def _skip_draws(draw: torch.Generator, windows: int, shape: tuple[int, int]) -> None:
    """Go past what other ranks draw for their windows, so that all draw as one process would."""
    tokens, vocabulary = shape
    step = max(1, _LOGITS // vocabulary)
    for _ in range(windows):
        for start in range(0, tokens, step):
            rows = min(step, tokens - start)
            torch.multinomial(torch.ones(rows, vocabulary), 1, generator=draw)


@steady()
def _output_gradient(
    model: LayerwiseModel, hidden: torch.Tensor, draw: torch.Generator
) -> tuple[torch.Tensor, NDArray[np.float64]]:
    """Of the log-likelihood of tokens drawn from the model, by the last layer's output.

    With it, for each token of the vocabulary, the mean variance of its being drawn. Of a large
    vocabulary the logits of some positions are there at a time.
    """
    tokens = hidden.shape[1]
    step = max(1, _LOGITS // model.vocabulary)
    varied: NDArray[np.float64] = np.zeros(model.vocabulary)
    with torch.enable_grad():
        leaf = hidden.detach().clone().requires_grad_(True)
        finished = model.finish_traced(leaf)
        below = torch.zeros_like(finished)
        for start in range(0, tokens, step):
            part = finished[:, start : start + step].detach().requires_grad_(True)
            scores = torch.log_softmax(model.logits_traced(part).float(), dim=-1)[0]
            chances = scores.detach().exp()
            drawn = torch.multinomial(chances.cpu(), 1, generator=draw)
            scores.gather(1, drawn.to(scores.device)).sum().backward()
            below[:, start : start + step] = gradient_of(part)
            share = (chances * (1 - chances)).mean(0).cpu().double().numpy()
            varied += share * (len(chances) / tokens)
        finished.backward(below)
    return gradient_of(leaf), varied
