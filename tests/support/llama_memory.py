"""What llama.cpp would allocate for a file: it says so itself, without reading a weight.

With ``no_alloc`` it builds the model, the caches and the worst graph as it would to run them and
adds up their sizes, which is how its own ``--fit`` decides; the figures are in its log. So files
may be holes, as large as published models. With ``real`` everything is allocated.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import llama_cpp
from llama_cpp._logger import llama_log_callback as usual_callback

from quantcli.artifacts.prepare import prepare_artifact
from quantcli.fit.needs import Run, read_memory
from quantcli.fit.weights import place_weights
from quantcli.formats import get_format
from quantcli.model import open_model
from quantcli.plan.recipe import Recipe

_CACHE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB")
_STATES = re.compile(r"RS buffer size = +([\d.]+) MiB")
_COMPUTE = re.compile(r"compute buffer size = +([\d.]+) MiB")
_MODEL = re.compile(r"model buffer size = +([\d.]+) MiB")
MIB = 2**20


@dataclass(frozen=True)
class Allocated:
    """Bytes of weights, of caches with states and of the compute buffer, to 0.01 MiB."""

    weights: float
    cache: float
    compute: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.compute


def allocate(
    path: Path, context: int, *, type: str = "F16", ubatch: int = 512, flash: bool = True,
    real: bool = False,
) -> Allocated:  # fmt: skip
    """As llama-cli would: one sequence, windows kept as windows, nothing on a GPU."""
    with _listening() as lines:
        settings = llama_cpp.llama_model_default_params()
        settings.no_alloc = not real
        settings.load_mode = 0  # No memory map, of which a part is not the model's.
        settings.use_extra_bufts = False
        settings.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), settings)
        assert model, "".join(lines[-5:])
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_ubatch, options.n_batch = context, ubatch, 2048
        options.flash_attn_type = int(flash)
        options.type_k = options.type_v = int(gguf.GGMLQuantizationType[type])
        options.swa_full = False
        run = llama_cpp.llama_init_from_model(model, options)
        assert run, "".join(lines[-5:])
        weights = float(llama_cpp.llama_model_size(model))
        llama_cpp.llama_free(run)
        llama_cpp.llama_model_free(model)
    text = "".join(lines)
    if real:
        weights = MIB * sum(map(float, _MODEL.findall(text)))
    cache = sum(map(float, _CACHE.findall(text) + _STATES.findall(text)))
    return Allocated(weights, MIB * cache, MIB * sum(map(float, _COMPUTE.findall(text))))


def predict(path: Path, run: Run) -> Allocated:
    """What quantcli tells of a GGUF."""
    with open_model(path) as model:
        memory = read_memory(model.metadata, model.tensors)
        sizes = {
            tensor.name: tensor.rows * get_format(tensor.dtype).row_bytes(tensor.columns)
            for tensor in model.tensors
        }
    weights = place_weights("", sizes, len(memory.cache.layers)).total
    return Allocated(weights, sum(memory.caches(run)), memory.compute(run))


def write_header(model: Path, path: Path, type: str = "Q4_K_M") -> Path:
    """The GGUF of that type that quantcli would make of a checkpoint, with a hole for weights."""
    with open_model(str(model)) as opened:
        job = prepare_artifact(opened, Recipe(type=type), path, check=False)
        (layout,) = job.layouts.values()
        with path.open("wb") as file:
            file.write(layout.header)
            file.truncate(layout.size)
    return path


@contextmanager
def _listening() -> Iterator[list[str]]:
    lines: list[str] = []

    def keep(level: int, text: bytes, data: object) -> None:
        lines.append(text.decode(errors="replace"))

    callback = llama_cpp.llama_log_callback(keep)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(usual_callback, ctypes.c_void_p(0))
