"""How much each direction of the embedding's output matters to the model's predictions.

To second order the KL divergence caused by a small error e in a hidden state is ``e^T F e / 2``
with the Fisher information F, the mean of g g^T over gradients g of the log-likelihood of tokens
drawn from the model itself (Amari's natural metric; used for rounding in YAQA, arXiv:2505.22988).
So F is to a row of the embedding what x x^T is to a row of a linear layer, and error feedback
applies to it in the same way. The gradients come from a backward pass that fills one layer at a
time; what each layer was given waits in a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantcli.calib.skeleton import Call, Skeleton
from quantcli.types import Event, Progress

WINDOWS = 16
"""Windows of text that are enough."""
_HELD_OUT = 4
"""Every so many of them is kept from the fit."""
_SEED = 20260101


@dataclass
class Sensitivity:
    """Means of g g^T at the embedding's output: fitted, and held out."""

    fit: NDArray[np.float64]
    held_out: NDArray[np.float64]

    @classmethod
    def zeros(cls, size: int) -> Sensitivity:
        """Nothing measured yet, for hidden states of ``size``."""
        return cls(np.zeros((size, size)), np.zeros((size, size)))

    def scale(self, factor: float) -> None:
        """Multiply both means."""
        self.fit *= factor
        self.held_out *= factor


def measure_sensitivity(
    skeleton: Skeleton, ids: NDArray[np.int32], folder: Path, found: Sensitivity
) -> Iterator[Event]:
    """Fill ``found``, two zero matrices of the hidden size, from windows ``ids`` (n, tokens)."""
    count, tokens = ids.shape
    layers = len(skeleton.layers)
    path = folder / "inputs.bin"
    shape = (layers + 1, count, tokens, skeleton.hidden_size)
    # bfloat16 has no NumPy dtype; float32 holds it.
    inputs = np.memmap(path, np.float32, "w+", shape=shape)
    steps = 2 * layers + 1
    try:
        with skeleton.start() as start:
            calls = [own_call(call) for call in start.calls(ids[0].tolist())]
            for number, window in enumerate(ids):
                inputs[0, number] = start.embed(window.tolist())[0].float().cpu().numpy()
        for index in range(layers):
            with skeleton.filled(skeleton.layer_parameters(index)):
                for number in range(count):
                    hidden = _load(skeleton, inputs[index, number])
                    hidden = skeleton.run(index, hidden, calls[index])
                    inputs[index + 1, number] = hidden[0].float().cpu().numpy()
            yield Progress(index + 1, steps, f"sensitivity, layer {index}")
        gradients = inputs[layers]
        draw = torch.Generator().manual_seed(_SEED)
        names = [*skeleton.outside_layers(), skeleton.head_name]
        with skeleton.filled(names):
            for number in range(count):
                hidden = _load(skeleton, inputs[layers, number])
                gradients[number] = _output_gradient(skeleton, hidden, draw)
        for index in reversed(range(layers)):
            with skeleton.filled(skeleton.layer_parameters(index)):
                for number in range(count):
                    hidden = _load(skeleton, inputs[index, number])
                    gradient = _load(skeleton, gradients[number])
                    gradients[number] = _backward(skeleton, index, hidden, gradient, calls[index])
            yield Progress(steps - index, steps, f"sensitivity, layer {index}")
        _sum(gradients, found)
    finally:
        del inputs
        path.unlink(missing_ok=True)


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
) -> NDArray[np.float32]:
    """Of the log-likelihood of tokens drawn from the model, by the last layer's output."""
    with torch.enable_grad():
        leaf = hidden.detach().clone().requires_grad_(True)
        scores = torch.log_softmax(skeleton.scores(leaf).float(), dim=-1)[0]
        drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=draw)
        scores.gather(1, drawn.to(scores.device)).sum().backward()
    return _array(leaf.grad)


def _backward(
    skeleton: Skeleton, index: int, hidden: torch.Tensor, gradient: torch.Tensor, call: Call
) -> NDArray[np.float32]:
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


def _sum(gradients: NDArray[np.float32], found: Sensitivity) -> None:
    counts = [0, 0]
    for number, rows in enumerate(gradients):
        apart = number % _HELD_OUT == _HELD_OUT - 1
        (found.held_out if apart else found.fit)[:] += rows.T @ rows
        counts[apart] += len(rows)
    found.fit /= max(1, counts[0])
    if counts[1]:
        found.held_out /= counts[1]
    else:
        found.held_out[:] = found.fit
