"""A quantized model beside its original, forward and backward, with one layer's weights in memory.

Windows pass a layer one after the other, what each was given waits in a file, and on the way back
each layer is filled again, run once more with gradients, and its weights' gradients are handed to
those who move the few numbers behind them. The original is never run: the states after its last
layer are known from the rounding before, and its predictions are made from them anew for each
window, since those of all windows would not fit anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantcli.artifacts.scratch import create_array
from quantcli.checkpoint_view import Use
from quantcli.layerwise.layered_model import Call, Skeleton
from quantcli.statistics.layer_gradients import embedding_scale, own_call
from quantcli.training.scale_parameters import ScaleParameters


class Streamed:
    """``quantized`` reads its weights through ``scales``; ``final`` gives the original's states.

    ``ids`` are the windows, int32 (n, tokens); ``final`` takes a window's number and returns what
    the original's last layer put out, (1, tokens, size).
    """

    def __init__(
        self, original: Skeleton, quantized: Skeleton, scales: ScaleParameters,
        final: Callable[[int], torch.Tensor], ids: NDArray[np.int32], folder: Path,
    ) -> None:  # fmt: skip
        self._original, self._quantized, self._scales = original, quantized, scales
        self._final, self._ids, self._folder = final, ids, folder
        with quantized.start() as start:
            self._calls: list[Call] = [own_call(call) for call in start.calls(ids[0].tolist())]
        self._scale = embedding_scale(original, ids[0])

    def judge(self, numbers: Sequence[int]) -> float:
        """Mean KL divergence of the original's predictions on these windows, in nats a token."""
        with self._inputs(1, len(numbers)) as inputs:
            self._embed(numbers, inputs[0])
            for index in range(len(self._calls)):
                self._forward(index, inputs[0], inputs[0])
            return self._divergence(numbers, inputs[0], gradients=False)

    def learn(self, numbers: Sequence[int]) -> float:
        """The same, and its gradient added to those that are moved."""
        layers = len(self._calls)
        with self._inputs(layers + 1, len(numbers)) as inputs:
            self._embed(numbers, inputs[0])
            for index in range(layers):
                self._forward(index, inputs[index], inputs[index + 1])
            loss = self._divergence(numbers, inputs[layers], gradients=True)
            if np.isfinite(loss):
                for index in reversed(range(layers)):
                    self._backward(index, inputs[index], inputs[layers])
                self._learn_embedding(numbers, inputs[layers])
        return loss

    @contextmanager
    def _inputs(self, depth: int, count: int) -> Iterator[NDArray[np.float32]]:
        path = self._folder / "inputs.bin"
        shape = (depth, count, self._ids.shape[1], self._quantized.hidden_size)
        inputs = create_array(path, np.float32, shape)
        try:
            yield inputs
        finally:
            del inputs
            path.unlink(missing_ok=True)

    def _embed(self, numbers: Sequence[int], into: NDArray[np.float32]) -> None:
        with self._quantized.start() as start:
            for place, number in enumerate(numbers):
                hidden = start.embed(self._ids[number].tolist())
                into[place] = hidden[0].float().cpu().numpy()

    def _forward(self, index: int, given: NDArray[np.float32], into: NDArray[np.float32]) -> None:
        skeleton = self._quantized
        with skeleton.filled(skeleton.layer_parameters(index)):
            for place in range(len(given)):
                hidden = skeleton.run(index, self._load(given[place]), self._calls[index])
                into[place] = hidden[0].float().cpu().numpy()

    def _divergence(
        self, numbers: Sequence[int], states: NDArray[np.float32], *, gradients: bool
    ) -> float:
        """The mean over the windows; with ``gradients`` these replace the states."""
        skeleton, original = self._quantized, self._original
        ours = [*skeleton.outside_layers(), skeleton.head_name]
        theirs = [*original.outside_layers(), original.head_name]
        total = 0.0
        with self._filled(ours, gradients=gradients), original.filled(theirs):
            for place, number in enumerate(numbers):
                with torch.no_grad():
                    final = self._final(number).to(original.device, original.dtype).clone()
                    aim = torch.log_softmax(original.scores(final).float(), dim=-1)
                with torch.set_grad_enabled(gradients):
                    leaf = self._load(states[place]).requires_grad_(gradients)
                    found = torch.log_softmax(skeleton.scores(leaf).float(), dim=-1)
                    loss = (aim.exp() * (aim - found)).sum(dim=-1).mean() / len(numbers)
                    total += float(loss.detach())
                    if not np.isfinite(total):
                        return total
                    if gradients:
                        loss.backward()
                        states[place] = _array(leaf.grad)
            if gradients:
                self._hand_over(ours)
        return total

    def _backward(
        self, index: int, given: NDArray[np.float32], gradients: NDArray[np.float32]
    ) -> None:
        """Replace gradients by the layer's outputs with those by its inputs."""
        skeleton, call = self._quantized, self._calls[index]
        names = skeleton.layer_parameters(index)
        with self._filled(names, gradients=True), torch.enable_grad():
            for place in range(len(given)):
                leaf = self._load(given[place]).requires_grad_(True)
                result = skeleton.layers[index](leaf, *call[0], **call[1])
                result = result[0] if isinstance(result, tuple) else result
                result.backward(self._load(gradients[place]))
                gradients[place] = _array(leaf.grad)
            self._hand_over(names)

    def _learn_embedding(self, numbers: Sequence[int], gradients: NDArray[np.float32]) -> None:
        uses = self._uses(self._quantized.embedding_name)
        if not uses:
            return
        width = gradients.shape[-1]
        rows, places = np.unique(self._ids[list(numbers)].reshape(-1), return_inverse=True)
        found = np.zeros((len(rows), width), np.float32)
        np.add.at(found, places, gradients.reshape(-1, width))
        found *= np.float32(self._scale)
        for row, gradient in zip(rows.tolist(), found, strict=True):
            self._scales.add_rows(uses[0].tensor.name, row, gradient[None])

    @contextmanager
    def _filled(self, names: Sequence[str], *, gradients: bool) -> Iterator[None]:
        """These parameters, of which those that are moved take gradients."""
        skeleton = self._quantized
        with skeleton.filled(names):
            if gradients:
                for name in names:
                    self._parameter(name).requires_grad_(bool(self._uses(name)))
            yield

    def _parameter(self, name: str) -> Any:
        """A filled parameter; where the head is the embedding as well, it is the head's."""
        module = self._quantized.module
        if name == self._quantized.head_name:
            return module.get_output_embeddings().weight
        return module.get_parameter(name)

    def _uses(self, name: str) -> list[Use]:
        uses = self._quantized.parameters.uses(name)
        return [use for use in uses if use.tensor.name in self._scales]

    def _hand_over(self, names: Sequence[str]) -> None:
        """The parameters' gradients, as gradients by GGUF's tensors."""
        for name in names:
            found = self._parameter(name).grad
            if found is None:
                continue
            gradient = found.float().cpu().numpy()
            for use in self._uses(name):
                rows = np.ascontiguousarray(use.piece.gather_gradient(gradient))
                if len(use.tensor.shape) < 2:
                    self._scales.add_vector(use.tensor.name, rows[0])
                else:
                    self._scales.add_rows(use.tensor.name, use.first, rows)

    def _load(self, values: NDArray[np.float32]) -> torch.Tensor:
        found = torch.from_numpy(np.array(values)).unsqueeze(0)
        return found.to(self._quantized.device, self._quantized.dtype)


def _array(gradient: Any) -> NDArray[np.float32]:
    if gradient is None:
        raise RuntimeError("a layer gave no gradient")
    found: NDArray[np.float32] = gradient[0].float().cpu().numpy()
    return found
