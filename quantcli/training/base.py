"""The protocol of a trainer, and the trainers by the name that a user gives.

A trainer improves a layer after its tensors were rounded: it changes their packed rows so that the
layer's output comes closer to the original's. Plug-ins register one in the entry-point group
``quantcli.trainers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from quantcli.formats.base import Bytes, Floats
from quantcli.registry import Registry, lacks_attributes
from quantcli.rounding.options import Options, Outcome
from quantcli.types import Event

if TYPE_CHECKING:
    import torch

    from quantcli.layerwise.call_recorder import Call
    from quantcli.layerwise.layerwise_model import LayerwiseModel
    from quantcli.training.window_shares import TrainingRanks

WindowStates = Callable[[int], "torch.Tensor"]
"""The hidden states (1, tokens, size) of a window."""


@dataclass
class RoundedLayer:
    """A layer's rounded tensors, ``packed`` by GGUF name, and how the layer is run.

    ``formats`` and ``read`` give a tensor's block format and its original rows, float32, and
    ``decode`` what its packed rows stand for; ``inputs`` and ``outputs`` give what the layer gets
    and what it ought to give, ``call`` what it is called with besides.
    """

    model: LayerwiseModel
    index: int
    call: Callable[[int], Call]
    formats: Callable[[str], str]
    read: Callable[[str], Floats]
    decode: Callable[[str, Bytes], Floats]
    packed: dict[str, Bytes]
    inputs: WindowStates
    outputs: WindowStates
    windows: int
    ranks: TrainingRanks | None = None
    """Where several processes train it, each on its own windows."""


class Trainer(Protocol):
    """Training of one rounded layer."""

    @property
    def name(self) -> str:
        """The name in ``--method``."""

    @property
    def options(self) -> tuple[str, ...]:
        """The fields of `Options` that it reads."""

    def train(
        self, layer: RoundedLayer, options: Options, outcomes: list[Outcome]
    ) -> Iterator[Event]:
        """Yield progress and notes; replace what it improves in ``layer.packed`` and ``outcomes``.

        Packed rows keep their shape.
        """


def _lack(found: Any) -> str | None:
    lack = lacks_attributes("name", "options", "train")(found)
    if lack is not None:
        return lack
    known = [field.name for field in fields(Options)]
    unknown = next((name for name in found.options if name not in known), None)
    return unknown and f"there is no option {unknown!r} (there are {', '.join(known)})"


TRAINERS = Registry("trainer", "trainers", {"tune": "quantcli.training.tune:TUNE"}, _lack)
"""`Trainer` objects."""
