"""What each layer is called with besides the hidden states, for each window of a walk.

Masks and rotary embeddings are the same for all windows of one length and recorded once. Where two
windows get other values (per-layer embeddings in Gemma 3n and 4, the first hidden states in
Zamba 2) they are recorded anew for each. Layers may share a mapping that earlier ones fill (keys
and values in Gemma 4): every window has its own, which lives as long as the walk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.layerwise.call_recorder import Call, fill_shared, is_same, shared_in
from quantcli.layerwise.layerwise_model import Embedder, LayerwiseModel
from quantcli.layerwise.shared_gradients import SharedGradients, States


class LayerCalls:
    """The calls of ``model``'s layers for the windows ``ids``; `record` comes first."""

    def __init__(self, model: LayerwiseModel, ids: NDArray[np.int32]) -> None:
        self._model = model
        self._ids = ids
        self._calls: Sequence[Call] = ()
        self._shared: dict[int, list[Any]] = {}
        self._gradients: dict[int, States] = {}
        self.varies = False
        """Whether windows differ in what layers get besides the hidden states."""
        self.shares = False
        """Whether layers take what earlier ones left."""

    def record(self, start: Embedder) -> None:
        """Learn the calls from the first window, and from the last whether they vary."""
        self._calls = start.calls(self._ids[0].tolist())
        self.shares = any(shared_in(call) for call in self._calls)
        if len(self._ids) > 1:
            self.varies = not is_same(self._calls, start.calls(self._ids[-1].tolist()))

    def of(self, index: int, window: int, *, keep: bool = False) -> Call:
        """The call of a layer, with a copy of what layers before it have left.

        What this layer leaves is only kept for the later ones where ``keep`` says so.
        """
        call, filled = self._fill(index, window)
        if keep and self.shares:
            self._shared[window] = filled
        return call

    def of_backward(self, index: int, window: int) -> tuple[Call, SharedGradients]:
        """The same for a way back, with the gradients by what layers have left."""
        call, filled = self._fill(index, window)
        return call, SharedGradients(filled, self._gradients.setdefault(window, {}))

    def _fill(self, index: int, window: int) -> tuple[Call, list[Any]]:
        call = self._calls[index]
        if self.varies:
            with self._model.start() as start:
                call = start.calls(self._ids[window].tolist())[index]
        return fill_shared(call, self._shared.get(window, ())) if self.shares else (call, [])
