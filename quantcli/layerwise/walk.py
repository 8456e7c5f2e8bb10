"""A walk: all windows go through one layer before the next one's weights are read.

The walk embeds the windows, fills and releases weights, keeps hidden states between the layers,
refuses values that are not finite, and commits each layer, so that an interrupted run continues
with the first layer that is not done. What is done with a layer, once it is filled, is for a
visitor to say: observe its inputs, send gradients back, round its weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.layerwise.call_recorder import Call
from quantcli.layerwise.check_layers import check_layers
from quantcli.layerwise.checkpoint import Checkpoint
from quantcli.layerwise.devices import device_errors, torch_device
from quantcli.layerwise.hidden_states import HiddenStateCache, HiddenStates, LayerInputs
from quantcli.layerwise.input_hooks import GradientHooks, InputHooks, MatmulInput, OutputGradient
from quantcli.layerwise.layer_calls import LayerCalls
from quantcli.layerwise.layerwise_model import LayerwiseModel
from quantcli.layerwise.model_run import DTYPES, ModelRun
from quantcli.layerwise.steady import use_threads
from quantcli.layerwise.window_batches import (
    batch_size,
    cut_batches,
    has_stacks,
    runs_batched,
)
from quantcli.model import Model
from quantcli.types import Event, Progress

_CHECKED = 32
"""Tokens that go through the whole decoder as well where no table knows its family."""

ObserveInput = Callable[[MatmulInput], None]
ObserveGradient = Callable[[OutputGradient], None]
Hooks = Callable[[], AbstractContextManager[Any]]
"""What is to be in place while one window passes."""
States = TypeVar("States", bound=HiddenStates)


class Visitor(Protocol):
    """Work along a walk; each method yields notes and progress."""

    def embedding(self) -> Iterator[Event]:
        """The windows are embedded; no layer was run."""
        yield from ()

    def layer(self, layer: LayerPass) -> Iterator[Event]:
        """A layer is filled; take all windows through it with `LayerPass.forward`."""

    def head(self) -> Iterator[Event]:
        """All layers are done, and everything outside them but the head's weights is filled."""


class LayerWalk(Generic[States]):
    """Windows ``ids``, int32 (windows, tokens), on their way through ``model``.

    ``states`` holds them between layers. ``done`` layers were finished in an earlier run, whose
    states are there already; ``commit`` is called in place of ``states.turn_over`` with the number
    of layers that are done. ``label`` is what a layer is called in errors, or None where values
    that are not finite are no error; ``task`` stands before it in progress, whose whole is
    ``passes`` times the model's bytes. On an accelerator the next layer's weights are read while it
    works, unless they are still to be made: ``ahead`` False.
    """

    def __init__(
        self, model: LayerwiseModel, ids: NDArray[np.int32], states: States, *, done: int = 0,
        commit: Callable[[int], None] | None = None, label: str | None = "layer", task: str = "",
        passes: int = 1, ahead: bool = True,
    ) -> None:  # fmt: skip
        self.model = model
        self.ids = ids
        self.states = states
        self.calls = LayerCalls(model, ids)
        self._done = done
        self._commit = commit or (lambda done: states.turn_over())
        self.label = label
        self._task = task
        self._passes = passes
        self._ahead = ahead and model.device.type != "cpu"
        self.batch = batch_size(model.device, ids.shape[1])
        """Windows that may go through a layer at once."""

    @property
    def windows(self) -> range:
        """The windows' numbers."""
        return range(len(self.ids))

    @property
    def layers(self) -> range:
        """The layers' numbers."""
        return range(len(self.model.layers))

    def get(self, window: int) -> torch.Tensor:
        """A window's input of the layer that is next, shape (1, tokens, size)."""
        return self.states.get(window).to(self.model.device)

    def get_next(self, window: int) -> torch.Tensor:
        """A window's output of that layer, once it is through."""
        return self.states.get_next(window).to(self.model.device)

    def embed(self) -> None:
        """Embed the windows, unless an earlier run took them further."""
        with self.model.start() as start:
            self.calls.record(start)
            if self._done and self.calls.shares:
                raise SourceError(
                    "the layers of this model share states, which an interrupted run does not keep",
                    hint="--force starts anew",
                )
            if self._done:
                return
            for number, window in enumerate(self.ids):
                hidden = start.embed(window.tolist())
                self.check(hidden, "the embedding", number)
                self.states.put(number, hidden)
        self.states.turn_over()

    def run(self, visitor: Visitor) -> Iterator[Event]:
        """The whole way: embedding, layers, head."""
        self.embed()
        yield from visitor.embedding()
        for index in self.layers[self._done :]:
            yield from self.layer(index, visitor.layer)
        with self.head():
            yield from visitor.head()

    def forward(self) -> Iterator[Event]:
        """All windows through all layers, with nobody watching."""
        self.embed()
        for index in self.layers:
            yield from self.layer(index)

    def layer(
        self, index: int, visit: Callable[[LayerPass], Iterator[Event]] | None = None
    ) -> Iterator[Event]:
        """One layer: its weights come, all windows pass, its weights go, its states are kept."""
        with self._filled(index, index + 1) as layer:
            yield from visit(layer) if visit else layer.forward()
        self._commit(index + 1)

    def backward(
        self: LayerWalk[LayerInputs], visit: Callable[[LayerPass], Iterator[Event]] | None = None
    ) -> Iterator[Event]:
        """From the last layer, whose outputs gave way to gradients by them, to the first."""
        for index in reversed(self.layers):
            self.states.turn_back()
            with self._filled(index, index - 1) as layer:
                yield from visit(layer) if visit else layer.backward()

    @contextmanager
    def head(self, *, weights: bool = False) -> Iterator[list[str]]:
        """Fill what is outside the layers, with ``weights`` also the head's; yields their names."""
        names = [*self.model.outside_layers(), *([self.model.head_name] if weights else [])]
        with self.model.filled(names):
            yield names

    def progress(self, index: int, windows: int, *, back: bool = False) -> Progress:
        """So many windows are through layer ``index``, or ``back`` through it."""
        starts = self.model.layer_starts
        whole = starts[-1]
        part = (starts[index + 1] - starts[index]) * windows // max(1, len(self.ids))
        done = whole + whole - starts[index + 1] + part if back else starts[index] + part
        return Progress(done, self._passes * whole, f"{self._task}layer {index}")

    @contextmanager
    def _filled(self, index: int, following: int) -> Iterator[LayerPass]:
        with ExitStack() as stack:
            names = self.model.layer_parameters(index)
            weights = stack.enter_context(self.model.filled(names))
            if self._ahead and following in self.layers:
                self.model.read_ahead(self.model.layer_parameters(following))
            if self.calls.varies:
                stack.enter_context(self.model.start())
            yield LayerPass(self, index, names, weights, stack.close)

    def check(self, hidden: torch.Tensor, what: str, window: int) -> None:
        """SourceError when a value is not finite, naming what it is and the window."""
        if self.label is not None and not torch.isfinite(hidden).all():
            raise SourceError(
                f"{what} holds a value that is not finite (window {window})",
                hint="the weights may be damaged: 'quantcli inspect --stats' tells",
            )


@dataclass
class LayerPass:
    """A layer whose ``weights`` are in memory, with the windows before it; ``release`` frees it."""

    walk: LayerWalk[Any]
    index: int
    names: Sequence[str]
    weights: Mapping[str, torch.Tensor]
    release: Callable[[], None]

    def call(self, window: int) -> Call:
        """What the layer is called with for a window, after the hidden states."""
        return self.walk.calls.of(self.index, window)

    def forward(
        self, observe: Callable[[int], ObserveInput] | None = None,
        after: Callable[[int], None] | None = None,
        together: Callable[[int], object] | None = None,
    ) -> Iterator[Event]:  # fmt: skip
        """Take all windows through the layer, yielding progress.

        ``observe`` is called with a window's number, and what it returns with each input of a
        weight in that window; ``after`` with the number once the window is through. Windows of
        which ``together`` gives the same may be observed as one, the first; those that nobody
        observes may too.
        """
        walk = self.walk
        if observe is None and after is None:
            together = together or (lambda number: 0)
        if together is not None and self._can_batch():
            yield from self._forward_batches(observe, after, together)
            return
        for number in walk.windows:
            call = walk.calls.of(self.index, number, keep=True)
            hidden = self._run(walk.get(number), call, observe and observe(number))
            walk.check(hidden, f"the output of {walk.label} {self.index}", number)
            walk.states.put(number, hidden)
            if after is not None:
                after(number)
            yield walk.progress(self.index, number + 1)

    def _can_batch(self) -> bool:
        """Whether the layer takes several windows at once, and gives what it gives of each."""
        walk = self.walk
        if walk.batch < 2 or len(walk.ids) < 3 or walk.calls.varies or walk.calls.shares:
            return False
        if has_stacks(self.weights):
            return False
        call = self.call(0)
        return runs_batched(lambda hidden: self._run(hidden, call, None), walk.get(0), walk.get(1))

    def _forward_batches(
        self, observe: Callable[[int], ObserveInput] | None, after: Callable[[int], None] | None,
        together: Callable[[int], object],
    ) -> Iterator[Event]:  # fmt: skip
        walk = self.walk
        for numbers in cut_batches(walk.windows, walk.batch, together):
            given = torch.cat([walk.get(number) for number in numbers])
            found = self._run(given, self.call(numbers[0]), observe and observe(numbers[0]))
            for number, hidden in zip(numbers, found.split(1), strict=True):
                walk.check(hidden, f"the output of {walk.label} {self.index}", number)
                walk.states.put(number, hidden)
                if after is not None:
                    after(number)
                yield walk.progress(self.index, number + 1)

    def run(self, window: int, hidden: torch.Tensor, observe: ObserveInput) -> torch.Tensor:
        """The layer's output for other states (1, tokens, size) of a window, inputs observed."""
        return self._run(hidden, self.call(window), observe)

    def _run(self, hidden: torch.Tensor, call: Call, observe: ObserveInput | None) -> torch.Tensor:
        parameters = self.walk.model.parameters
        feeds, orders = parameters.feeds, parameters.turned_columns
        with InputHooks(self.weights, observe, feeds, orders) if observe else nullcontext():
            return self.walk.model.run(self.index, hidden, call)

    def backward(self, hooks: Hooks = nullcontext) -> Iterator[Event]:
        """Take all windows' gradients back through the layer, in ``hooks``, yielding progress."""
        walk = self.walk
        for number in walk.windows:
            gradient = walk.get_next(number)
            with hooks():
                found = self._run_backwards(number, gradient)
            walk.states.replace(number, found)
            yield walk.progress(self.index, number + 1, back=True)

    def observe_gradients(
        self, gradients: Iterable[tuple[int, torch.Tensor]], observe: ObserveGradient,
        hooks: Hooks = nullcontext,
    ) -> None:  # fmt: skip
        """Send gradients by some windows' outputs back, and observe those by weights' outputs.

        Each window in ``hooks``. Not after `forward`, which lets the windows' inputs go.
        """
        for number, gradient in gradients:
            with hooks(), GradientHooks(self.weights, observe):
                self._run_backwards(number, gradient)

    def _run_backwards(self, window: int, gradient: torch.Tensor) -> torch.Tensor:
        walk = self.walk
        call, shared = walk.calls.of_backward(self.index, window)
        return walk.model.run_backwards(self.index, walk.get(window), gradient, call, shared)


@contextmanager
def open_walk(
    run: ModelRun, model: Model, folder: Path, checkpoint: Checkpoint | None = None, *,
    max_memory: int, follows: bool = False, label: str = "layer", task: str = "",
) -> Iterator[LayerWalk[HiddenStateCache]]:  # fmt: skip
    """A walk of ``run``'s windows through ``model`` from the first layer not in ``checkpoint``.

    States that take more than ``max_memory`` bytes are kept in files of ``folder``. A walk that
    ``follows`` another is committed by it. SourceError when the windows have tokens that the model
    has not, or an earlier run's states are not whole.
    """
    use_threads(run.threads, torch_device(run.device).type)
    layers = build_model(run, model)
    ranks, ids = run.ranks, run.windows.ids
    if int(ids.max()) >= layers.vocabulary:
        raise SourceError(
            f"{run.model.path}: the text has token {int(ids.max())}, but the model embeds "
            f"{layers.vocabulary}",
            hint="the tokenizer belongs to another model",
        )
    if ranks is not None:
        ids = ids[list(ranks.windows.numbers)]
    states = HiddenStateCache(
        (*ids.shape, layers.hidden_size), layers.dtype,
        folder if ranks is None else ranks.folder, max_memory=max_memory,
        turn=checkpoint.turn if checkpoint else 0, of=None if ranks is None else ranks.windows,
    )  # fmt: skip

    def commit(done: int) -> None:
        turn = states.commit()
        if ranks is not None:
            # A layer counts as done when the states of all have reached the disk.
            ranks.group.wait()
        if checkpoint is not None and not follows:
            checkpoint.commit(done, turn)

    done = checkpoint.done if checkpoint else 0
    try:
        if done:
            states.load()
        elif model.untabled is not None and not follows:
            check_layers(layers, ids[0, :_CHECKED].tolist())
        with device_errors(run.device):
            yield LayerWalk(
                layers, ids, states, done=done, commit=commit if checkpoint else None, label=label,
                task=task, ahead=not follows,
            )  # fmt: skip
    finally:
        states.close()


def build_model(run: ModelRun, model: Model) -> LayerwiseModel:
    """``run``'s model, or another one in its place, in the run's precision and on its device."""
    device = torch_device(run.device)
    return LayerwiseModel(model, run.model.config, dtype=DTYPES[run.dtype], device=device)


def run_silently(events: Iterator[Event]) -> None:
    """Run to the end without reporting anything."""
    deque(events, maxlen=0)
