"""What one file needs on a machine: on the GPU, and in the memory beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantcli.fit.cache import CacheShape, read_cache
from quantcli.fit.compute import UBATCH, GraphShape, read_graph
from quantcli.fit.machine import Machine
from quantcli.fit.weights import Weights
from quantcli.types import MetaValue, OutputTensor


@dataclass(frozen=True)
class Run:
    """How a model would run: tokens of context, type of the cache, flash attention."""

    context: int
    cache: str = "F16"
    flash: bool = True
    ubatch: int = UBATCH


@dataclass(frozen=True)
class Layout:
    """What is on the GPU: the last ``layers``, the output counting as one as for llama.cpp's
    ``--n-gpu-layers``, without the experts of the first ``cpu_experts`` layers (``--n-cpu-moe``).
    """

    layers: int
    cpu_experts: int = 0


@dataclass(frozen=True)
class Memory:
    """What a model keeps and computes with, whatever its weights' types."""

    cache: CacheShape
    graph: GraphShape

    def caches(self, run: Run) -> list[int]:
        """Bytes of each layer's cache."""
        return self.cache.layer_bytes(
            run.context, type=run.cache, ubatch=run.ubatch, flash=run.flash
        )

    def compute(self, run: Run) -> int:
        """Bytes of the compute buffer."""
        return self.graph.buffer_bytes(self.cache, run.context, ubatch=run.ubatch, flash=run.flash)


@dataclass(frozen=True)
class Needs:
    """What one file needs, in bytes.

    ``device`` is what the machine that was asked for holds, ``beside`` what the memory next to a
    GPU does. ``whole``: all layers are on the GPU. ``layout`` is None where there is no GPU.
    """

    weights: int
    cache: int
    compute: int
    device: int
    beside: int
    fits: bool
    whole: bool
    layout: Layout | None = None

    @property
    def total(self) -> int:
        """All that is allocated, wherever."""
        return self.weights + self.cache + self.compute


def read_memory(metadata: Mapping[str, MetaValue], tensors: Sequence[OutputTensor]) -> Memory:
    """What the model with these key-values and tensors keeps; PlanError where it is not known."""
    return Memory(read_cache(metadata, tensors), read_graph(metadata, tensors))


def find_needs(memory: Memory, run: Run, machine: Machine, weights: Weights) -> Needs:
    """The needs of a file: whole if that fits, else as much of it on the GPU as fits."""
    if machine.kind != "gpu":
        return lay_out(memory, run, machine, weights, None)
    everything = len(weights.layers) + 1
    whole = lay_out(memory, run, machine, weights, Layout(everything))
    if whole.fits:
        return whole
    tries = [Layout(everything, count) for count in range(1, everything) if any(weights.experts)]
    tries += [Layout(count) for count in range(everything - 1, 0, -1)]
    parts = (lay_out(memory, run, machine, weights, layout) for layout in tries)
    return next((part for part in parts if part.fits), whole)


def lay_out(
    memory: Memory, run: Run, machine: Machine, weights: Weights, layout: Layout | None
) -> Needs:
    """The needs of a file in that layout; None is for a machine with one memory."""
    caches, compute = memory.caches(run), memory.compute(run)
    loaded = weights.total
    if layout is None:
        device, beside, whole = loaded + sum(caches) + compute, 0, True
    else:
        count = len(weights.layers)
        kept = max(0, layout.layers - 1)
        on_gpu = range(count - kept, count)
        experts = sum(weights.experts[layer] for layer in on_gpu if layer < layout.cpu_experts)
        moved = sum(weights.layers[layer] for layer in on_gpu) - experts
        cached = sum(caches[layer] for layer in on_gpu)
        head = weights.head if layout.layers else 0
        copied = weights.shared_head if layout.layers else 0
        device = moved + cached + head + copied + (compute if layout.layers else 0)
        whole = kept == count and not layout.cpu_experts
        beside = loaded - moved - head + sum(caches) - cached + (0 if whole else compute)
    fits = device <= machine.usable and (machine.ram is None or beside <= machine.ram)
    return Needs(loaded, sum(caches), compute, device, beside, fits, whole, layout)
