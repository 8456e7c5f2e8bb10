"""Stand-ins for parts of a model, in place for the time of one call of the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from quantcli.errors import ArchitectureError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with after the hidden states."""

Answer = Callable[[torch.Tensor], Any]
"""What a layer returns: its hidden states, in the form that its decoder takes them in."""

FORMS: tuple[Answer, ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, None),
    lambda hidden: (hidden, None, None),
)
"""The forms that decoders of transformers know."""


class Recorder(nn.Module):
    """Stands in for a layer: keeps what it is called with and passes the hidden states on."""

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __init__(self, layer: Any, answer: Answer) -> None:
        super().__init__()
        # Hidden from nn.Module, which would register it as a child.
        object.__setattr__(self, "_layer", layer)
        self._answer = answer
        self.is_called = False

    def __getattr__(self, name: str) -> Any:
        # Decoders read attributes such as attention_type from their layers.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the arguments."""
        if args:
            self.hidden, *rest = args
            self.args = tuple(rest)
        else:
            self.hidden, self.args = kwargs.pop("hidden_states"), ()
        self.kwargs, self.is_called = kwargs, True
        answer = self._answer(self.hidden)
        if _CHOICE not in kwargs:
            return answer
        hidden = answer[0] if isinstance(answer, tuple) else answer
        return hidden, _all_tokens(self._layer, hidden)


_CHOICE = "prev_topk_indices"
"""What GLM-5's layers hand on besides hidden states: the tokens that an indexer chose."""


def _all_tokens(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The choice in windows that are no longer than it: every token, shape (1, tokens, tokens).

    ArchitectureError for longer windows, if a layer takes another one's choice.
    """
    tokens, most = hidden.shape[1], layer.self_attn.config.index_topk
    if tokens > most and "shared" in layer.self_attn.config.indexer_types:
        raise ArchitectureError(
            f"layers of {type(layer).__name__} take over which {most} tokens another one chose, "
            f"which is known beforehand in windows of at most as many tokens, not of {tokens}",
            hint=f"--ctx {most}",
        )
    return torch.arange(tokens, dtype=torch.int32, device=hidden.device).expand(1, tokens, tokens)


@contextmanager
def replaced_layers(layers: Any, answers: Sequence[Answer]) -> Iterator[list[Recorder]]:
    """Put a recorder in the place of each of a decoder's layers; ``answers`` are theirs."""
    originals = list(layers)
    stand_ins = [Recorder(layer, answer) for layer, answer in zip(originals, answers, strict=True)]
    try:
        for i, stand_in in enumerate(stand_ins):
            layers[i] = stand_in
        yield stand_ins
    finally:
        for i, layer in enumerate(originals):
            layers[i] = layer


def find_gap(seen: Sequence[Recorder], axes: int = 3) -> int | None:
    """The first layer that does not get exactly what the one before it gives, if any.

    Hidden states have so many ``axes``.
    """
    for number, stand_in in enumerate(seen):
        if not stand_in.is_called or stand_in.hidden.dim() != axes:
            return number
        if number and not _is_view(stand_in.hidden, seen[number - 1].hidden):
            return number
    return None


def _is_view(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same memory in the same shape."""
    return (one.data_ptr(), one.shape, one.stride()) == (
        other.data_ptr(), other.shape, other.stride()
    )  # fmt: skip


def copy_call(value: Any, copies: dict[int, Any]) -> Any:
    """A copy that may take part in a backward pass, as tensors of an inference may not.

    ``copies`` keeps a tensor that many layers are called with one tensor, and a mapping that they
    share one mapping.
    """
    if isinstance(value, torch.Tensor):
        if id(value) not in copies:
            copies[id(value)] = value.clone()
        return copies[id(value)]
    if isinstance(value, tuple | list):
        return type(value)(copy_call(item, copies) for item in value)
    if isinstance(value, MutableMapping) and not is_shared(value):
        return {key: copy_call(item, copies) for key, item in value.items()}
    return value


def is_shared(value: Any) -> bool:
    """Whether layers put into it what later ones take out, such as keys and values."""
    return isinstance(value, MutableMapping) and not value


def shared_in(call: Call) -> list[Any]:
    """The mappings of a recorded call that layers share."""
    return [value for value in _values(call) if is_shared(value)]


def fill_shared(call: Call, stored: Sequence[Mapping[Any, Any]]) -> tuple[Call, list[Any]]:
    """The call with copies of its shared mappings, which hold ``stored``, and these copies."""
    filled: list[Any] = []

    def fill(value: Any) -> Any:
        if not is_shared(value):
            return value
        filled.append(copy.copy(value))
        if stored:
            filled[-1].update(stored[len(filled) - 1])
        return filled[-1]

    args = tuple(map(fill, call[0]))
    return (args, {key: fill(value) for key, value in call[1].items()}), filled


def _values(call: Call) -> Iterator[Any]:
    yield from call[0]
    yield from call[1].values()


def is_same(one: Any, other: Any) -> bool:
    """Whether two calls say the same, tensors by their values."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            return False
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    return True


class _Output:
    """What a decoder returns, to whoever wants its hidden states alone."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Any:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def replaced_decoder(decoder: Any, hidden: torch.Tensor) -> Iterator[None]:
    """Have the decoder return ``hidden``, whatever it is called with."""
    decoder.forward = lambda *args, **kwargs: _Output(hidden)
    try:
        yield
    finally:
        # The instance's attribute goes and the class's method shows again.
        del decoder.forward


class Lookup(TorchFunctionMode):
    """Embeds with rows that are read when they are looked up; ``tables`` are without values.

    ``read`` takes a table's name and row numbers.
    """

    def __init__(
        self,
        tables: Mapping[str, torch.Tensor],
        read: Callable[[str, NDArray[np.int64]], torch.Tensor],
    ) -> None:
        super().__init__()
        self._names = {id(table): name for name, table in tables.items()}
        self._read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.embedding and id(args[1]) in self._names:
            wanted, places = torch.unique(args[0], return_inverse=True)
            return self._read(self._names[id(args[1])], wanted.cpu().numpy())[places]
        if func is torch.Tensor.to and torch.device("meta") in args[1:]:
            # Llama 4 sends the ids to where the table is, which has no values there.
            return args[0]
        return func(*args, **(kwargs or {}))
