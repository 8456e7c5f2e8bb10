"""Quantization-aware training on the real grid, a layer at a time, after its weights were rounded.

A layer as it was rounded runs on the windows' inputs, the error of its output goes back to every
code and scale, and all of them move against it by steps that shrink to nothing: one matrix can
compensate the error of another. The state that is best on held-out windows is taken, and only if it
is clearly better there than the layer was before; a layer whose loss is no longer finite keeps the
best state until then.

Sources: SignRound (arXiv:2309.05516) for offsets of the rounding, EfficientQAT's Block-AP
(arXiv:2407.11062) for training scales and weights of a block together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from quantcli.checkpoint_view import Use
from quantcli.layerwise.steady import steady
from quantcli.rounding.options import Options, Outcome
from quantcli.training.base import RoundedLayer
from quantcli.training.trainable_codes import Trainable, is_trainable
from quantcli.training.window_shares import WindowShares
from quantcli.types import Event, Note, Progress

BATCH = 4
"""Windows in a step."""
MARGIN = 0.02
"""A layer's held-out error must fall by this share."""
_TURNS = 15
"""How often a training looks at the held-out windows."""
_SEED = 20260102


class _Tune:
    """Training of codes and scales as a `Trainer`."""

    name = "tune"
    options = ("tune_steps", "propagate")

    def train(
        self, layer: RoundedLayer, options: Options, outcomes: list[Outcome]
    ) -> Iterator[Event]:
        """Train ``layer``; its tensors and outcomes are replaced where it is accepted."""
        device = str(layer.model.device)
        tensors = {
            name: Trainable(layer.formats(name), packed, layer.read(name), device)
            for name, packed in layer.packed.items()
            if is_trainable(layer.formats(name))
        }
        place = f"layer {layer.index}"
        shares = WindowShares(layer.windows, layer.ranks)
        if not tensors or shares.total < 2:
            yield Note(f"{place}: nothing to tune")
            return
        names = layer.model.layer_parameters(layer.index)
        with layer.model.filled(names):
            training = _LayerTraining(layer, tensors, names, shares)
            yield from training.run(options.tune_steps, place)
        before, after = training.first, training.least
        if not after < (1 - MARGIN) * before:
            yield Note(
                f"{place}: tuning found nothing clearly better than {before:.4g}, left as it is"
            )
            return
        for name, tensor in tensors.items():
            layer.packed[name] = tensor.pack()
        for i, outcome in enumerate(outcomes):
            if outcome.tensor in tensors:
                outcomes[i] = replace(outcome, method=f"{outcome.method},tune")
        yield Note(f"{place}: tuned, held-out error of its output {before:.4g} -> {after:.4g}")


TUNE = _Tune()


class _LayerTraining:
    """A layer's parameters, filled, and the tensors that they are made from."""

    def __init__(
        self, layer: RoundedLayer, tensors: dict[str, Trainable], names: Sequence[str],
        shares: WindowShares,
    ) -> None:  # fmt: skip
        self._layer, self._tensors, self._shares = layer, tensors, shares
        self._uses: list[tuple[torch.nn.Parameter, Use]] = []
        for name in names:
            uses = [u for u in layer.model.parameters.uses(name) if u.tensor.name in layer.packed]
            if uses:
                parameter = layer.model.module.get_parameter(name)
                # Its memory may be the file's own.
                parameter.data = parameter.data.clone()
                parameter.requires_grad_(any(use.tensor.name in tensors for use in uses))
                self._uses += [(parameter, use) for use in uses]
        for name, packed in layer.packed.items():
            values = layer.decode(name, packed)
            self._place(name, torch.from_numpy(values))
        self.first = self.least = self._judge()

    def run(self, steps: int, place: str) -> Iterator[Event]:
        """Train, and take up the best state that was met."""
        draw = torch.Generator()
        self._shares.seed(draw, _SEED + self._layer.index)
        best = {name: tensor.state.copy() for name, tensor in self._tensors.items()}
        every = max(1, steps // _TURNS)
        for step in range(steps):
            batch = self._shares.batch(BATCH, draw)
            finite = self._step(batch, 2 / steps * (1 - step / steps))
            if finite and ((step + 1) % every == 0 or step + 1 == steps):
                loss = self._judge()
                finite = bool(np.isfinite(loss))
                if loss < self.least:
                    self.least = loss
                    best = {name: tensor.state.copy() for name, tensor in self._tensors.items()}
                yield Progress(step + 1, steps, f"tuning {place}", "steps")
            if not finite:
                yield Note(
                    f"{place}: the loss was no longer finite at step {step + 1} of {steps}; "
                    "training stopped there and the best state before it stays",
                    level="warning",
                )
                break
        for name, tensor in self._tensors.items():
            tensor.state = best[name]

    @steady()
    def _step(self, batch: Sequence[int], share: float) -> bool:
        """One step on some windows; False, and nothing moved, where a gradient is not finite."""
        for parameter, _ in self._uses:
            parameter.grad = None
        if not self._shares.all_of(all(self._learn(number) for number in batch)):
            return False
        gradients = {
            name: self._shares.add_up(
                self._gradient(name) if batch else torch.zeros_like(tensor.values())
            )
            for name, tensor in self._tensors.items()
        }
        if not all(bool(torch.isfinite(found).all()) for found in gradients.values()):
            return False
        for name, tensor in self._tensors.items():
            tensor.descend(gradients[name], share)
            self._place(name, tensor.values())
        return True

    def _learn(self, number: int) -> bool:
        """Add a window's gradient; False, and nothing added, where its loss is not finite."""
        with torch.enable_grad():
            loss = self._loss(number)
            if not torch.isfinite(loss):
                return False
            loss.backward()
        return True

    @torch.no_grad()
    @steady()
    def _judge(self) -> float:
        return self._shares.mean(sum(float(self._loss(i)) for i in self._shares.held_out))

    def _loss(self, number: int) -> torch.Tensor:
        """Squared error of a window's outputs, each token's as a share of its own square.

        The next layer normalises each token, so that only this share matters to it.
        """
        layer = self._layer
        aim = layer.outputs(number).float()
        found = layer.model.output(layer.index, layer.inputs(number), layer.call(number))
        errors = (found.float() - aim).square().sum(dim=-1)
        return (errors / aim.square().sum(dim=-1).clamp(min=1e-20)).mean()

    @torch.no_grad()
    def _place(self, name: str, values: torch.Tensor) -> None:
        """Put a tensor's rows where transformers has them."""
        for parameter, use in self._uses:
            if use.tensor.name == name:
                rows = values[use.first : use.first + use.piece.rows]
                use.piece.scatter(parameter.data, rows)

    def _gradient(self, name: str) -> torch.Tensor:
        """The gradient of a tensor's rows, gathered from the parameters."""
        parts = {}
        for parameter, use in self._uses:
            if use.tensor.name != name or parameter.grad is None:
                continue
            parts[use.first] = use.piece.gather_gradient(parameter.grad)
        return torch.cat([parts[first].float() for first in sorted(parts)])
