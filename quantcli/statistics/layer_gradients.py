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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantcli.artifacts.scratch import create_array
from quantcli.layerwise.layered_model import Call, Skeleton
from quantcli.types import Event, Progress

_HELD_OUT = 4
"""Every so many windows one is kept from the fit."""
FEWEST = 16
"""Windows that the embedding needs in any case."""
_SEED = 20260101


@dataclass
class EmbeddingFisher:
    """Means of g g^T at the embedding's output: fitted, and held out."""

    fit: NDArray[np.float64]
    held_out: NDArray[np.float64]


@dataclass
class LayerGradients:
    """Gradients by the inputs of all layers and by the last one's output, in a file of ``folder``.

    ``numbers`` are the windows of the run that they belong to.
    """

    folder: Path
    numbers: tuple[int, ...]
    _values: NDArray[np.float32] | None = None

    def open(self, shape: tuple[int, ...]) -> bool:
        """Take the file of an earlier run, if it is whole and as large as (layers + 1, windows,
        tokens, size) values."""
        try:
            known = bool(json.loads(self._mark.read_text()) == [*self.numbers, *shape])
        except (OSError, ValueError):
            return False
        if known:
            self._values = np.memmap(self._path, np.float32, "r", shape=shape)
        return known

    def create(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A new file; `finish` makes it count."""
        self._mark.unlink(missing_ok=True)
        self._values = create_array(self._path, np.float32, shape)
        return self._values

    def finish(self, variance: NDArray[np.float64]) -> None:
        """The values are whole; ``variance`` is what the property of that name will be."""
        values = self._values
        np.save(self.folder / "variance.npy", variance)
        if isinstance(values, np.memmap):
            values.flush()
            self._mark.write_text(json.dumps([*self.numbers, *values.shape]))

    def of(self, layer: int, skeleton: Skeleton) -> Iterator[tuple[int, torch.Tensor]]:
        """Each window's number with the gradient (1, tokens, size) by the output of ``layer``."""
        if self._values is None:
            raise ValueError("there are no gradients")
        for number, values in zip(self.numbers, self._values[layer + 1], strict=True):
            yield number, _load(skeleton, values)

    def embedding(self) -> EmbeddingFisher:
        """Means at the embedding's output."""
        if self._values is None:
            raise ValueError("there are no gradients")
        size = self._values.shape[-1]
        sums, counts = np.zeros((2, size, size)), [0, 0]
        for number, rows in enumerate(self._values[0]):
            apart = number % _HELD_OUT == _HELD_OUT - 1
            sums[int(apart)] += rows.T @ rows
            counts[apart] += len(rows)
        fit = sums[0] / max(1, counts[0])
        return EmbeddingFisher(fit, sums[1] / counts[1] if counts[1] else fit.copy())

    @property
    def variance(self) -> NDArray[np.float64]:
        """For each token of the vocabulary the mean of p (1 - p), p its probability."""
        found: NDArray[np.float64] = np.load(self.folder / "variance.npy")
        return found

    @property
    def _path(self) -> Path:
        return self.folder / "gradients.f32"

    @property
    def _mark(self) -> Path:
        return self.folder / "gradients.json"


def choose_windows(count: int, most: int) -> tuple[int, ...]:
    """Numbers of at most ``most`` of ``count`` windows, evenly spread."""
    return tuple(int(n) for n in np.unique(np.linspace(0, count - 1, min(most, count)).round()))


def measure_gradients(
    skeleton: Skeleton, ids: NDArray[np.int32], found: LayerGradients
) -> Iterator[Event]:
    """Fill ``found`` from its windows among ``ids`` (n, tokens)."""
    layers = len(skeleton.layers)
    count, tokens = len(found.numbers), ids.shape[1]
    shape = (layers + 1, count, tokens, skeleton.hidden_size)
    if found.open(shape):
        return
    # bfloat16 has no NumPy dtype; float32 holds it. Inputs give way to gradients as they come.
    values = found.create(shape)
    steps = 2 * layers + 1
    with skeleton.start() as start:
        calls = [own_call(call) for call in start.calls(ids[0].tolist())]
        for place, number in enumerate(found.numbers):
            values[0, place] = start.embed(ids[number].tolist())[0].float().cpu().numpy()
    for index in range(layers):
        with skeleton.filled(skeleton.layer_parameters(index)):
            for place in range(count):
                hidden = _load(skeleton, values[index, place])
                hidden = skeleton.run(index, hidden, calls[index])
                values[index + 1, place] = hidden[0].float().cpu().numpy()
        yield Progress(index + 1, steps, f"sensitivity, layer {index}", "layers")
    draw = torch.Generator().manual_seed(_SEED)
    variance: NDArray[np.float64] = np.zeros(skeleton.vocabulary)
    with skeleton.filled([*skeleton.outside_layers(), skeleton.head_name]):
        for place in range(count):
            hidden = _load(skeleton, values[layers, place])
            values[layers, place], varied = _output_gradient(skeleton, hidden, draw)
            variance += varied / count
    for index in reversed(range(layers)):
        with skeleton.filled(skeleton.layer_parameters(index)):
            for place in range(count):
                hidden = _load(skeleton, values[index, place])
                gradient = _load(skeleton, values[index + 1, place])
                values[index, place] = run_backwards(
                    skeleton, index, hidden, gradient, calls[index]
                )
        yield Progress(steps - index, steps, f"sensitivity, layer {index}", "layers")
    found.finish(variance)


def embedding_scale(skeleton: Skeleton, window: NDArray[np.int32]) -> float:
    """What the model multiplies embedding rows by (Gemma does), by least squares on a window."""
    with skeleton.start() as start:
        hidden = start.embed(window.tolist())[0].float().cpu().numpy()
    rows = skeleton.parameters.lookup(skeleton.embedding_name, window.astype(np.int64))
    rows = rows.astype(np.float32)
    return float((hidden * rows).sum() / max(float((rows * rows).sum()), 1e-30))


def own_call(value: Any) -> Any:
    """A copy that may take part in a backward pass, as tensors of an inference may not."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        return type(value)(own_call(item) for item in value)
    if isinstance(value, dict):
        return {key: own_call(item) for key, item in value.items()}
    return value


def _load(skeleton: Skeleton, values: NDArray[np.float32]) -> torch.Tensor:
    found = torch.from_numpy(np.array(values)).unsqueeze(0)
    return found.to(skeleton.device, skeleton.dtype)


def _output_gradient(
    skeleton: Skeleton, hidden: torch.Tensor, draw: torch.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Of the log-likelihood of tokens drawn from the model, by the last layer's output.

    With it, for each token of the vocabulary, the mean variance of its being drawn.
    """
    with torch.enable_grad():
        leaf = hidden.detach().clone().requires_grad_(True)
        scores = torch.log_softmax(skeleton.scores(leaf).float(), dim=-1)[0]
        chances = scores.detach().exp()
        drawn = torch.multinomial(chances.cpu(), 1, generator=draw)
        scores.gather(1, drawn.to(scores.device)).sum().backward()
    varied: NDArray[np.float64] = (chances * (1 - chances)).mean(0).double().cpu().numpy()
    return _array(leaf.grad), varied


def run_backwards(
    skeleton: Skeleton, index: int, hidden: torch.Tensor, gradient: torch.Tensor, call: Call
) -> NDArray[np.float32]:
    """The gradient by a layer's input ``hidden`` (tokens, size), given the one by its output.

    The layer's parameters must be filled, and ``call`` must be an `own_call`.
    """
    with torch.enable_grad():
        leaf = hidden.detach().clone().requires_grad_(True)
        result = skeleton.layers[index](leaf, *call[0], **call[1])
        result = result[0] if isinstance(result, tuple) else result
        result.backward(gradient)
    return _array(leaf.grad)


def _array(gradient: torch.Tensor | None) -> NDArray[np.float32]:
    if gradient is None:
        raise RuntimeError("a layer gave no gradient")
    found: NDArray[np.float32] = gradient[0].float().cpu().numpy()
    return found
