"""A model's hidden states on their way through its layers, and its matrices as float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from quantcli.formats.base import Floats
from quantcli.layerwise.checkpoint import Checkpoint
from quantcli.layerwise.hidden_states import States
from quantcli.layerwise.layered_model import Call, Skeleton
from quantcli.layerwise.runner import DTYPES, Run, enter
from quantcli.model import Model
from quantcli.types import OutputTensor


@dataclass
class Stream:
    """A model's hidden states on their way through its layers."""

    skeleton: Skeleton
    states: States
    calls: list[Call]

    def get(self, number: int) -> torch.Tensor:
        """A window's input of the layer that is next, shape (1, tokens, size)."""
        return self.states.get(number).to(self.skeleton.device)

    def get_next(self, number: int) -> torch.Tensor:
        """A window's output of that layer, once it was put in."""
        return self.states.get_next(number).to(self.skeleton.device)


@contextmanager
def open_stream(
    run: Run, model: Model, folder: Path, checkpoint: Checkpoint, max_memory: int
) -> Iterator[Stream]:
    """The windows of ``run`` at the first layer of ``model`` that ``checkpoint`` has not done.

    States that take more than ``max_memory`` bytes are kept in files of ``folder``.
    """
    skeleton = Skeleton(model, run.model.config, dtype=DTYPES[run.dtype], device=run.device)
    ids = run.windows.ids
    size = ids.size * skeleton.hidden_size * skeleton.dtype.itemsize
    shape = (*ids.shape, skeleton.hidden_size)
    in_memory = size <= max_memory
    states = States(folder, shape, skeleton.dtype, in_memory=in_memory, turn=checkpoint.turn)
    try:
        yield Stream(skeleton, states, enter(run, skeleton, states, checkpoint))
    finally:
        states.close()


def matrix_reader(model: Model, tensor: OutputTensor) -> Callable[[int], Floats]:
    """What reads matrix i of a tensor, a stack of them or the one, as float32."""
    height = tensor.shape[-2]

    def read(matrix: int) -> Floats:
        return model.read_floats(tensor, matrix * height, (matrix + 1) * height)

    return read
