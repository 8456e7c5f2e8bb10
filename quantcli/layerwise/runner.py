"""A calibration, layer by layer: only one block's weights are ever in memory.

All windows go through a layer before the next one's weights are read. Products are computed in
float32, or in bfloat16 where the weights are stored so and the processor multiplies it natively;
everything that is summed is summed in float64 over float32 values. After each layer the state is
on the disk, and a run that continues from there gives the same bytes, on the same machine and
with the same number of threads, as one that was never interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import quantcli
from quantcli.errors import SourceError, UsageError
from quantcli.layerwise.checkpoint import Checkpoint
from quantcli.layerwise.hidden_states import States
from quantcli.layerwise.input_hooks import Product, Tap
from quantcli.layerwise.layered_model import Call, Skeleton
from quantcli.layerwise.windows import Windows
from quantcli.model import TRANSFORMS_KEY, Model
from quantcli.statistics.collector import Collector
from quantcli.types import Event, Note, Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """What is to be calibrated on what, and how."""

    model: Model
    windows: Windows
    needs: tuple[str, ...]
    folder: Path
    dtype: str
    device: str
    max_memory: int
    threads: int

    @property
    def identity(self) -> dict[str, object]:
        """What must be the same for a run to be continued, by what to call it."""
        return {
            "model": _fingerprint(self.model),
            "text or cut of it": hashlib.sha256(self.windows.ids.tobytes()).hexdigest(),
            "window length": self.windows.ids.shape[1],
            "choice of statistics": list(self.needs),
            "dtype": self.dtype,
            "device": self.device,
            "number of threads": self.threads,
            "version of quantcli": quantcli.__version__,
            "version of torch": version("torch"),
            "version of transformers": version("transformers"),
        }


def choose_device(name: str | None) -> str:
    """CUDA where there is one, else the CPU; UsageError when the one asked for is not there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"there is no device {name!r}", hint="cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device here", hint="--device cpu")
    return name


def choose_dtype(name: str | None, device: str, model: Model) -> str:
    """The fast "bfloat16" where no weight loses by it and the processor has it, else "float32"."""
    if name is not None:
        if name not in DTYPES:
            raise UsageError(f"products are not computed in {name!r}", hint=" or ".join(DTYPES))
        return name
    matrices = {tensor.dtype for tensor in model.tensors if len(tensor.shape) > 1}
    if matrices != {"BF16"}:
        return "float32"
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        native = bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))
    return "bfloat16" if native else "float32"


def calibrate(run: Run, checkpoint: Checkpoint) -> Iterator[Event]:
    """Take all windows through all layers; each layer's statistics end up in ``checkpoint``.

    Yields notes and progress. SourceError when a value is not finite, naming layer and tensor.
    """
    torch.set_num_threads(run.threads)
    skeleton = Skeleton(run.model, run.model.config, dtype=DTYPES[run.dtype], device=run.device)
    ids = run.windows.ids
    if int(ids.max()) >= skeleton.vocabulary:
        raise SourceError(
            f"{run.model.path}: the text has token {int(ids.max())}, but the model embeds "
            f"{skeleton.vocabulary}",
            hint="the tokenizer belongs to another model",
        )
    shape = (*ids.shape, skeleton.hidden_size)
    size = ids.size * skeleton.hidden_size * skeleton.dtype.itemsize
    in_memory = size <= run.max_memory
    if not in_memory:
        yield Note(f"hidden states ({size / 1e9:.1f} GB) are kept in a file at {run.folder}")
    states = States(run.folder, shape, skeleton.dtype, in_memory=in_memory, turn=checkpoint.turn)
    try:
        calls = enter(run, skeleton, states, checkpoint)
        layers = _Layers(run, skeleton, states, checkpoint, calls)
        for index in range(checkpoint.done, len(skeleton.layers)):
            yield from layers.run(index)
        yield from layers.head()
    finally:
        states.close()


def enter(run: Run, skeleton: Skeleton, states: States, checkpoint: Checkpoint) -> list[Call]:
    """The first layer's input, or the states of an earlier run; and how layers are called."""
    with skeleton.start() as start:
        calls = start.calls(run.windows.ids[0].tolist())
        if checkpoint.done:
            states.load()
            return calls
        for number, window in enumerate(run.windows.ids):
            hidden = start.embed(window.tolist())
            check_finite(hidden, "the embedding", number)
            states.put(number, hidden)
    states.turn_over()
    return calls


@dataclass
class _Layers:
    run_: Run
    skeleton: Skeleton
    states: States
    checkpoint: Checkpoint
    calls: list[Call]

    def __post_init__(self) -> None:
        self._starts = layer_starts(self.run_.model, self.skeleton)

    def run(self, index: int) -> Iterator[Event]:
        """One layer: its weights come, all windows pass, its weights go."""
        place = f"layer {index}"
        collector = self._collector(place)
        windows = len(self.run_.windows.ids)
        span = self._starts[index + 1] - self._starts[index]
        try:
            with self.skeleton.filled(self.skeleton.layer_parameters(index)) as weights:
                tap = Tap(weights, collector.observe)
                for number in range(windows):
                    collector.next_window()
                    tap.forget()
                    hidden = self.states.get(number).to(self.skeleton.device)
                    with tap:
                        hidden = self.skeleton.run(index, hidden, self.calls[index])
                    check_finite(hidden, f"the output of layer {index}", number)
                    self.states.put(number, hidden)
                    done = self._starts[index] + span * (number + 1) // windows
                    yield Progress(done, self._starts[-1], place)
            self.checkpoint.save(index, collector)
        finally:
            collector.close()
        self.checkpoint.commit(index + 1, self.states.commit())

    def head(self) -> Iterator[Event]:
        """The output head's input; its weights are not needed for it."""
        collector = self._collector("the output head")
        name = self.skeleton.head_name
        try:
            with self.skeleton.filled(self.skeleton.outside_layers()):
                for number in range(len(self.run_.windows.ids)):
                    collector.next_window()
                    hidden = self.states.get(number).to(self.skeleton.device)
                    rows = self.skeleton.finish(hidden).flatten(0, 1)
                    collector.observe(Product(name, 0, rows, (name, 0)))
            self.checkpoint.save(len(self.skeleton.layers), collector)
        finally:
            collector.close()
        yield Progress(self._starts[-1], self._starts[-1], "output")

    def _collector(self, place: str) -> Collector:
        targets = self.skeleton.parameters.targets
        return Collector(targets, self.run_.needs, self.run_.folder, place)


def layer_starts(model: Model, skeleton: Skeleton) -> list[int]:
    """Stored bytes before each layer, and of all layers, to measure progress by."""
    stored = {tensor.name: tensor for tensor in model.tensors}
    starts = [0]
    for index in range(len(skeleton.layers)):
        uses = (skeleton.parameters.uses(name) for name in skeleton.layer_parameters(index))
        starts.append(
            starts[-1]
            + sum(
                model.stored_bytes(stored[use.tensor.name])
                * use.piece.rows
                // max(1, use.tensor.rows)
                for found in uses
                for use in found
            )
        )
    return starts


def check_finite(hidden: torch.Tensor, what: str, window: int) -> None:
    """SourceError when a value of ``hidden`` is not finite, naming what it is and the window."""
    if not torch.isfinite(hidden).all():
        raise SourceError(
            f"{what} holds a value that is not finite (window {window})",
            hint="the weights may be damaged: 'quantcli inspect --stats' tells",
        )


def _fingerprint(model: Model) -> str:
    """SHA-256 over the configuration and what the files' headers and dates tell of the weights.

    Weights that are transformed as they are read are told apart by their transforms.
    """
    whole = hashlib.sha256(json.dumps(model.config, sort_keys=True).encode())
    if TRANSFORMS_KEY in model.metadata:
        whole.update(str(model.metadata[TRANSFORMS_KEY].value).encode())
    for info in sorted(model.store.tensors.values(), key=lambda info: info.name):
        whole.update(f"{info.name}\0{info.dtype}\0{info.shape}\0".encode())
    for file in sorted({info.file for info in model.store.tensors.values()}):
        found = file.stat()
        whole.update(f"{file.name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return whole.hexdigest()
