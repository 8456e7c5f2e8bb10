"""Training end to end, after every tensor was rounded: the model's own predictions are the aim.

Each method before it knows one matrix or one layer; what remains is the error of the whole. Here
the KL divergence from the original's predictions goes back through all layers to what can be moved
without a byte more: the float16 factors of the blocks, norms and biases, and the codes. Held-out
windows are judged before, between and after; the best state is stored, and where nothing was better
than the start, the start. Every state is one that a file can hold, so the divergence that is
reported is that of the file.

Sources: the end-to-end stage of EfficientQAT (arXiv:2407.11062), which trains scales after its
layers; norm tweaking (arXiv:2309.02784); KL to the original as in LLM-QAT (arXiv:2305.17888); codes
trained on the whole model's loss as in PV-Tuning (arXiv:2405.14852).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from quantcli.formats import native
from quantcli.formats.base import Floats
from quantcli.layerwise.layerwise_model import LayerwiseModel
from quantcli.layerwise.model_run import ModelRun
from quantcli.layerwise.ranked_run import wait_until_seen
from quantcli.layerwise.walk import build_model
from quantcli.rounding.codecs import WeightCodec
from quantcli.rounding.quantized_model import quantized_model
from quantcli.rounding.run_store import EncodedStore
from quantcli.rounding.trained import TrainingGain, save_trained, trained_path
from quantcli.training.layerwise_backprop import LayerwiseBackprop
from quantcli.training.model_parameters import ModelParameters
from quantcli.training.window_shares import TrainingRanks, WindowShares
from quantcli.types import Event, Note, Progress

BATCH = 2
"""Windows in a step."""
RATE = 3e-3
"""The largest step, as a share of what is moved."""
CODE_RATE = 0.08
"""The largest step of a code's latent over the root of all steps, in mean gaps of its grid."""
_WARM_UP = 10
"""Steps until that rate is reached."""
_TURNS = 8
"""How often a training looks at the held-out windows."""
_SEED = 20260103


@dataclass(frozen=True)
class Task:
    """A model that was rounded: its run, all its tensors' codecs, and their packed rows.

    ``original`` is the unquantized model, ``final`` gives the states after its last
    layer, (1, tokens, size) of a window. ``codes`` tells that codes move too.
    """

    run: ModelRun
    codecs: Mapping[str, WeightCodec]
    store: EncodedStore
    original: LayerwiseModel
    final: Callable[[int], torch.Tensor]
    codes: bool = True


def train_end_to_end(task: Task, steps: int) -> Iterator[Event]:
    """Train what lies in the store's packed rows; ``task.store`` holds the trained scales.

    A run that had finished this takes up what it found.
    """
    store, ranks = task.store, task.run.ranks
    known = trained_path(store.folder).is_file()
    if ranks is not None:
        known = ranks.group.gather(known)[0]
    if not known:
        training = _ModelTraining(task)
        try:
            yield from training.run(steps)
        finally:
            training.close()
    if ranks is not None:
        ranks.group.wait()
        wait_until_seen(trained_path(store.folder))
    store.open_trained()
    if store.trained is not None:
        yield describe(store.trained.gain)


def describe(gain: TrainingGain) -> Note:
    """The gain of training, as a sentence."""
    if not gain.taken:
        return Note(
            f"end to end: {gain.steps} steps found nothing better than a held-out KL divergence "
            f"of {gain.before:.4g}; the model is left as it was rounded"
        )
    return Note(
        f"end to end: held-out KL divergence {gain.before:.4g} -> {gain.after:.4g} "
        f"in {gain.steps} steps"
    )


class _ModelTraining:
    def __init__(self, task: Task) -> None:
        self._run, self._store = task.run, task.store
        run = task.run
        originals = {tensor.name: tensor for tensor in run.model.tensors}

        def original(name: str, start: int, stop: int) -> Floats:
            return run.model.read_floats(originals[name], start, stop)

        self._moved = ModelParameters(
            task.store, _packed(task), _vectors(task), original if task.codes else None, run.folder
        )
        task.store.changes = self._moved
        model = quantized_model(run.model, task.codecs, task.store)
        self._backprop = LayerwiseBackprop(
            task.original,
            build_model(run, model),
            self._moved,
            task.final,
            run.windows.ids
            if run.ranks is None
            else run.windows.ids[list(run.ranks.windows.numbers)],
            run.folder,
        )
        ranks = run.ranks
        own = None if ranks is None else TrainingRanks(ranks.group, ranks.windows)
        count = len(run.windows.ids if ranks is None else ranks.windows.numbers)
        self._shares = WindowShares(count, own)

    def close(self) -> None:
        self._store.changes = None
        self._moved.close()

    def run(self, steps: int) -> Iterator[Event]:
        """Train, and save the best state that was met."""
        draw = torch.Generator()
        self._shares.seed(draw, _SEED)
        before = least = self._judge()
        yield Progress(0, steps, "training end to end", "steps")
        stopped = 0
        every = max(1, steps // _TURNS)
        for step in range(steps):
            batch = self._shares.batch(BATCH, draw)
            share = schedule(step, steps)
            self._moved.forget()
            finite = not batch or math.isfinite(self._backprop.learn(batch))
            finite = self._shares.all_of(finite)
            if finite and self._run.ranks is not None:
                self._moved.add_up(self._run.ranks.group)
            finite = finite and self._moved.descend(
                RATE * share, CODE_RATE / math.sqrt(steps) * share
            )
            if finite and ((step + 1) % every == 0 or step + 1 == steps):
                loss = self._judge()
                finite = math.isfinite(loss)
                if loss < least:
                    least = loss
                    self._moved.keep()
            if not finite:
                stopped = step + 1
                yield Note(
                    f"end to end: the loss was no longer finite at step {stopped} of {steps}; "
                    "training stopped there and the best state before it stays",
                    level="warning",
                )
                break
            yield Progress(step + 1, steps, "training end to end", "steps")
        self._moved.restore()
        gain = TrainingGain(steps, before, least, stopped)
        if self._run.ranks is None or self._run.ranks.group.index == 0:
            save_trained(self._store.folder, self._moved if gain.taken else None, gain)

    def _judge(self) -> float:
        """The mean divergence on the held-out windows."""
        own = self._shares.held_out
        if self._run.ranks is None:
            return self._backprop.judge(own)
        return self._shares.mean(self._backprop.judge(own) * len(own) if own else 0.0)


def schedule(step: int, steps: int) -> float:
    """The share of the largest rates: it rises over the first steps, then falls as a cosine."""
    rise = min(1.0, (step + 1) / _WARM_UP)
    return rise * (1 + math.cos(math.pi * step / steps)) / 2


def _packed(task: Task) -> dict[str, str]:
    """Block formats of the tensors in the store."""
    return {name: codec.name for name, codec in task.codecs.items() if name in task.store}


def _vectors(task: Task) -> dict[str, Floats]:
    """Norms and biases that stay in float32, by name."""
    found = {}
    for tensor in task.run.model.tensors:
        codec = task.codecs.get(tensor.name)
        kept = codec is not None and codec.name == "F32" and len(tensor.shape) == 1
        kept = kept and all(piece.passes_gradients for piece in tensor.pieces)
        if kept and tensor.values is None and not tensor.name.startswith("rope"):
            rows = task.run.model.read_rows(tensor, 0, 1)
            found[tensor.name] = np.array(native.to_float32(rows)[0])
    return found
