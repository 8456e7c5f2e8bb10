"""Stand-ins for parts of a model, in place for the time of one call of the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from quantcli.errors import ArchitectureError


class Recorder(nn.Module):
    """Stands in for a layer: keeps what it is called with and passes the hidden states on."""

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __init__(self, layer: Any) -> None:
        super().__init__()
        # Hidden from nn.Module, which would register it as a child.
        object.__setattr__(self, "_layer", layer)

    def __getattr__(self, name: str) -> Any:
        # Decoders read attributes such as attention_type from their layers.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer, name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep the arguments."""
        self.hidden, self.args, self.kwargs = hidden, args, kwargs
        return (hidden, _all_tokens(self._layer, hidden)) if _CHOICE in kwargs else hidden


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
def replaced_layers(layers: Any) -> Iterator[list[Recorder]]:
    """Put a recorder in the place of each of a decoder's layers."""
    originals = list(layers)
    stand_ins = [Recorder(layer) for layer in originals]
    try:
        for i, stand_in in enumerate(stand_ins):
            layers[i] = stand_in
        yield stand_ins
    finally:
        for i, layer in enumerate(originals):
            layers[i] = layer


def copy_call(value: Any, copies: dict[int, torch.Tensor]) -> Any:
    """A copy that may take part in a backward pass, as tensors of an inference may not.

    ``copies`` keeps a tensor that many layers are called with one tensor.
    """
    if isinstance(value, torch.Tensor):
        if id(value) not in copies:
            copies[id(value)] = value.clone()
        return copies[id(value)]
    if isinstance(value, tuple | list):
        return type(value)(copy_call(item, copies) for item in value)
    if isinstance(value, dict):
        return {key: copy_call(item, copies) for key, item in value.items()}
    return value


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
    """Embeds with rows that are read when they are looked up; ``table`` is without values."""

    def __init__(
        self, table: torch.Tensor, read: Callable[[NDArray[np.int64]], torch.Tensor]
    ) -> None:
        super().__init__()
        self._table = table
        self._read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.embedding and args[1] is self._table:
            wanted, places = torch.unique(args[0], return_inverse=True)
            return self._read(wanted.cpu().numpy())[places]
        if func is torch.Tensor.to and self._table.device in args[1:]:
            # Llama 4 sends the ids to where the table is, which has no values there.
            return args[0]
        return func(*args, **(kwargs or {}))
