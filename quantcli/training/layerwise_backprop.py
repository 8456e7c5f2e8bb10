"""Backpropagation through a quantized model with one layer's weights in memory.

A walk takes some windows forward and keeps every layer's input in a file. On the way back each
layer is filled again and run once more with gradients, and the gradients of its weights are added
up for the block scales and codes behind them. The original is never run: the states after its last
layer are known from the rounding before, and its predictions are made from them again for each
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

from quantcli.artifacts.scratch import ArrayFile
from quantcli.checkpoint_view import Use
from quantcli.layerwise.hidden_states import LayerInputs
from quantcli.layerwise.layerwise_model import LayerwiseModel, gradient_of
from quantcli.layerwise.steady import steady
from quantcli.layerwise.walk import LayerPass, LayerWalk, run_silently
from quantcli.training.model_parameters import ModelParameters
from quantcli.types import Event


class LayerwiseBackprop:
    """``quantized`` reads through ``parameters``; ``final`` gives the original's states.

    ``ids`` are the windows, int32 (n, tokens); ``final`` takes a window's number and returns what
    the original's last layer put out, (1, tokens, size).
    """

    def __init__(
        self, original: LayerwiseModel, quantized: LayerwiseModel, parameters: ModelParameters,
        final: Callable[[int], torch.Tensor], ids: NDArray[np.int32], folder: Path,
    ) -> None:  # fmt: skip
        self._original, self._quantized, self._moved = original, quantized, parameters
        self._final, self._ids, self._folder = final, ids, folder
        self._scale = original.embedding_scale(ids[0])

    def judge(self, numbers: Sequence[int]) -> float:
        """Mean KL divergence of the original's predictions on these windows, in nats a token."""
        with self._walk(numbers, 1) as walk:
            run_silently(walk.forward())
            return self._divergence(walk, numbers, gradients=False)

    def learn(self, numbers: Sequence[int]) -> float:
        """The same, and its gradient added to those that are moved."""
        with self._walk(numbers, len(self._quantized.layers) + 1) as walk:
            run_silently(walk.forward())
            loss = self._divergence(walk, numbers, gradients=True)
            if np.isfinite(loss):
                run_silently(walk.backward(self._layer))
                # Of several streams the embedding is the first.
                width = self._quantized.hidden_size // self._quantized.streams
                self._learn_embedding(numbers, walk.states.values[0,][..., :width])
        return loss

    @contextmanager
    def _walk(self, numbers: Sequence[int], depth: int) -> Iterator[LayerWalk[LayerInputs]]:
        model, ids = self._quantized, self._ids[list(numbers)]
        path = self._folder / "inputs.bin"
        inputs = ArrayFile.create(path, np.float32, (depth, *ids.shape, model.hidden_size))
        try:
            yield LayerWalk(model, ids, LayerInputs(inputs, model.dtype), label=None)
        finally:
            inputs.close()
            path.unlink(missing_ok=True)

    @steady()
    def _divergence(
        self, walk: LayerWalk[LayerInputs], numbers: Sequence[int], *, gradients: bool
    ) -> float:
        """The mean over the windows; with ``gradients`` these replace the last layer's outputs."""
        original = self._original
        theirs = [*original.outside_layers(), original.head_name]
        total = 0.0
        with walk.head(weights=True) as ours, original.filled(theirs):
            if gradients:
                self._require_gradients(ours)
            for window, number in enumerate(numbers):
                with torch.no_grad():
                    final = self._final(number).to(original.device, original.dtype).clone()
                    aim = torch.log_softmax(original.scores(final).float(), dim=-1)
                with torch.set_grad_enabled(gradients):
                    leaf = walk.get(window).requires_grad_(gradients)
                    found = torch.log_softmax(walk.model.scores(leaf).float(), dim=-1)
                    loss = (aim.exp() * (aim - found)).sum(dim=-1).mean() / len(numbers)
                    total += float(loss.detach())
                    if not np.isfinite(total):
                        return total
                    if gradients:
                        loss.backward()
                        walk.states.replace(window, gradient_of(leaf))
            if gradients:
                self._hand_over(ours)
        return total

    def _layer(self, layer: LayerPass) -> Iterator[Event]:
        """Gradients by a layer's outputs give way to those by its inputs."""
        self._require_gradients(layer.names)
        yield from layer.backward()
        self._hand_over(layer.names)

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
            self._moved.add_rows(uses[0].tensor.name, row, gradient[None])

    def _require_gradients(self, names: Sequence[str]) -> None:
        """Of the parameters that are moved."""
        for name in names:
            self._parameter(name).requires_grad_(bool(self._uses(name)))

    def _parameter(self, name: str) -> Any:
        """A filled parameter or buffer; where the head is also the embedding, the head's."""
        module = self._quantized.module
        if name == self._quantized.head_name:
            return module.get_output_embeddings().weight
        owner, _, key = name.rpartition(".")
        return getattr(module.get_submodule(owner), key)

    def _uses(self, name: str) -> list[Use]:
        uses = self._quantized.parameters.uses(name)
        return [use for use in uses if use.tensor.name in self._moved]

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
                    self._moved.add_vector(use.tensor.name, rows[0])
                else:
                    self._moved.add_rows(use.tensor.name, use.first, rows)
