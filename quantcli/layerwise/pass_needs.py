"""What it takes to pass windows through a model layer by layer: see `quantcli.layerwise.walk`.

One layer's weights are filled in the dtype of the products, one window is under way, and the
hidden states of all windows lie in memory or in two files that take turns.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantcli.plan.layer_sizes import LayerSize, ModelSizes
from quantcli.plan.needs import Stage, Work

LIBRARIES = 150 << 20
"""What torch and the libraries behind it take once they have worked: their own code, a thread's
buffers, and what the allocator keeps of what was freed."""
FORWARD_LIBRARIES = 80 << 20
"""The same where windows go forwards alone and nothing is rounded but to nearest."""
_KEPT_OF_LAYER = 6
"""Values of a layer that are alive in a forward pass, in hidden states, beside products' outputs:
the residual, its norm, attention's output and theirs in float32."""
_EACH_VALUE = 60
"""Operations of products that take as long as what else is done with a value in memory."""
_HALF = 2
"""Bytes of a bfloat16."""
_KEPT_SHAPES, _PRIMITIVE = 1024, 300 << 10
_BACKWARD = 3
"""A backward pass holds a layer's values, their gradients, and copies in between."""


@dataclass(frozen=True)
class Passes:
    """A model of ``sizes`` run on ``windows`` windows of ``tokens`` tokens, ``itemsize`` bytes for
    each value that products are computed in."""

    sizes: ModelSizes
    windows: int
    tokens: int
    itemsize: int

    @property
    def states(self) -> int:
        """Bytes of all windows' hidden states."""
        return self.windows * self.tokens * self.sizes.hidden * self.itemsize

    def forward_bytes(self, layer: LayerSize) -> int:
        """A filled layer with a window in it."""
        values = layer.outputs + _KEPT_OF_LAYER * self.sizes.hidden
        return layer.elements * self.itemsize + self.tokens * values * self.itemsize

    def backward_bytes(self, layer: LayerSize) -> int:
        """A filled layer through which a window's gradient comes back."""
        values = layer.outputs + _KEPT_OF_LAYER * self.sizes.hidden
        return layer.elements * self.itemsize + _BACKWARD * self.tokens * values * self.itemsize

    def forward_work(self, layer: LayerSize, windows: int) -> Work:
        """Products with the layer's weights and of its attention."""
        tokens, hidden = windows * self.tokens, self.sizes.hidden
        attention = 2 * self.tokens * hidden
        values = layer.outputs + _KEPT_OF_LAYER * hidden
        return Work(
            products=2.0 * tokens * (layer.active + attention),
            float32=float(_EACH_VALUE * tokens * values),
            read=layer.stored,
        )

    def head_work(self, windows: int) -> Work:
        """Logits of all tokens."""
        head = self.sizes.head
        return Work(products=2.0 * windows * self.tokens * head.elements)


def states_stage(passes: Passes, *, in_memory: bool) -> Stage:
    """Hidden states between layers, in memory or in the two files that take turns."""
    work = Work(written=float(passes.states * len(passes.sizes.layers)))
    if in_memory:
        return Stage("hidden states", passes.states, work=work)
    return Stage("hidden states", kept=2 * passes.states, work=work)


def committed_states(passes: Passes, layer: int, *, in_memory: bool) -> list[Stage]:
    """The file that a run goes on from if need be, of states that are in memory.

    The first two layers leave one each; then these take turns.
    """
    if not in_memory or layer > 1:
        return []
    return [Stage("hidden states", passes.states, kept=passes.states)]


def primitives_bytes(passes: Passes) -> int:
    """What oneDNN keeps of products in bfloat16 that it has compiled, one for each shape.

    Experts' inputs have as many lengths as there are experts and windows; it keeps 1,024 of them.
    """
    experts = max(
        (one.matrices for layer in passes.sizes.layers for one in layer.matrices), default=1
    )
    if experts == 1 or passes.itemsize != _HALF:
        return 0
    return min(_KEPT_SHAPES, 4 * passes.windows * experts * len(passes.sizes.layers)) * _PRIMITIVE
