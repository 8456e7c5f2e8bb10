"""What every weight is multiplied with, seen where the product happens, and what comes back.

`InputHooks` watch torch's matrix products for the time of a ``with`` block and recognise a weight
by its memory, so linear layers, GPT-2's transposed ones and experts that are slices of a stacked
parameter are all covered without a line per architecture. Inputs that several weights share
(q, k and v; gate and up) are recognised as the same memory. Where one product takes all experts
with all tokens (Llama 4), a token that was not sent to an expert comes as zeros and is left out.
Where llama.cpp multiplies in another order (latent attention's keys), a tensor's inputs are what
another weight puts out.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from quantcli.archs.rules import Feed

_OPERANDS = {
    torch.nn.functional.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.matmul: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
    torch.bmm: (0, 1),
    torch.Tensor.bmm: (0, 1),
}
"""Products, and where the rows and the weight, a matrix or a stack, are among their arguments."""


def _operands(func: Any, args: Any, known: Container[int]) -> tuple[Any, Any, bool] | None:
    """Rows and weight of a product, and whether it was turned: the weight first, then columns.

    ``known`` are weights' addresses. Mamba's steps are made by a turned product.
    """
    places = _OPERANDS.get(func)
    if places is None:
        return None
    rows, weight = args[places[0]], args[places[1]]
    if places == (0, 1) and _address(weight) not in known and weight.dim() > 1:
        return weight.mT, rows, True
    return rows, weight, False


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


@dataclass(frozen=True, slots=True)
class MatmulInput:
    """A weight meets its input: parameter name, matrix within a stack, and the input's rows.

    ``name`` is the tensor's where a `Feed` gave the input.

    ``rows`` has shape (tokens, columns of the weight). ``shared`` is the first parameter and
    matrix in this pass that had the very same input.
    """

    name: str
    matrix: int
    rows: torch.Tensor
    shared: tuple[str, int]


@dataclass(frozen=True, slots=True)
class OutputGradient:
    """The gradient by the output of a product with a parameter, shape (tokens, rows).

    ``matrix`` is the number of the one that it was with, of a stack.
    """

    name: str
    rows: torch.Tensor
    matrix: int = 0


class InputHooks(TorchFunctionMode):
    """Calls ``observe`` for each product with one of ``weights``, in one pass of one window.

    ``feeds`` names the weights whose outputs are inputs as well; ``turned_columns`` those whose
    tensor has its columns in another order, in which the input is told then.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], observe: Callable[[MatmulInput], None],
        feeds: Mapping[str, Sequence[Feed]] | None = None,
        turned_columns: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._feeds = feeds or {}
        self._orders = {
            name: torch.from_numpy(order) for name, order in (turned_columns or {}).items()
        }
        self._by_storage = {
            _address(tensor): (name, tensor)
            for name, tensor in weights.items()
            if tensor.dim() >= 2
        }
        self._observe = observe
        # Held so that an address cannot be reused by another tensor within the pass.
        self._inputs: list[tuple[torch.Tensor, tuple[str, int]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = _operands(func, args, self._by_storage)
        if operands is not None:
            rows, weight, turned = operands
            self._see(rows, weight, result.mT if turned else result)
        return result

    def _see(self, rows: torch.Tensor, weight: torch.Tensor, outputs: torch.Tensor) -> None:
        found = self._by_storage.get(_address(weight))
        if found is None:
            return
        name, whole = found
        for feed in self._feeds.get(name, ()):
            groups = outputs.reshape(-1, feed.groups, outputs.shape[-1] // feed.groups)
            for group in range(feed.groups):
                fed = groups[:, group, feed.start : feed.stop]
                self._observe(MatmulInput(feed.tensor, group, fed, (feed.tensor, group)))
        first = weight.storage_offset() // whole.stride(0) if whole.dim() > 2 else 0
        if weight.dim() < 3:
            self._tell(name, first, rows.reshape(-1, rows.shape[-1]))
            return
        for index, own in enumerate(rows):
            sent = own[own.any(dim=-1)]
            if len(sent):
                self._tell(name, first + index, sent)

    def _tell(self, name: str, matrix: int, rows: torch.Tensor) -> None:
        order = self._orders.get(name)
        if order is not None:
            rows = rows[:, order.to(rows.device)]
        shared = self._first_with(rows, (name, matrix))
        self._observe(MatmulInput(name, matrix, rows, shared))

    def _first_with(self, rows: torch.Tensor, weight: tuple[str, int]) -> tuple[str, int]:
        for seen, first in self._inputs:
            if (seen.data_ptr(), seen.shape) == (rows.data_ptr(), rows.shape):
                return first
        self._inputs.append((rows, weight))
        return weight


class GradientHooks(TorchFunctionMode):
    """Calls ``observe`` with the gradient by each output of a product with one of ``weights``.

    Products are recognised while it is active; gradients come when one is taken backwards.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], observe: Callable[[OutputGradient], None]
    ) -> None:
        super().__init__()
        self._known = {
            _address(tensor): (name, tensor)
            for name, tensor in weights.items()
            if tensor.dim() >= 2
        }
        self._observe = observe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = _operands(func, args, self._known)
        if operands is not None:
            rows, weight, turned = operands
            found = self._known.get(_address(weight))
            if found is not None and result.requires_grad and _is_whole(weight, found[1]):
                name, whole = found
                first = weight.storage_offset() // whole.stride(0) if whole.dim() > 2 else 0
                sent = rows.detach().any(dim=-1) if weight.dim() > 2 else None
                result.register_hook(partial(self._see, name, first, sent, turned))
        return result

    def _see(
        self, name: str, first: int, sent: torch.Tensor | None, turned: bool,
        gradient: torch.Tensor,
    ) -> None:  # fmt: skip
        """``sent`` marks the tokens that each matrix of a whole stack got."""
        gradient = gradient.mT if turned else gradient
        if sent is None:
            rows = gradient.reshape(-1, gradient.shape[-1])
            self._observe(OutputGradient(name, rows, first))
            return
        for index, own in enumerate(gradient):
            if sent[index].any():
                self._observe(OutputGradient(name, own[sent[index]], first + index))


def _is_whole(weight: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether a matrix that is multiplied with is one of a stack, and no part of such a one."""
    return parameter.dim() < 3 or sorted(weight.shape[-2:]) == sorted(parameter.shape[-2:])
