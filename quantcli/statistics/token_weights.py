"""How much each token's input of an expert counts: by the gradient that comes back for it.

To second order an error E of a matrix costs the mean of ``(g^T E x)^2 / 2`` over its tokens, g
being the gradient by the output. Taken apart into outputs and inputs, ``E[g g^T]`` and
``E[x x^T]``, it loses that tokens with large gradients have other inputs than those with small
ones. An expert's do: the router gives them more or less weight, and some are nearly sent elsewhere.
The mean of ``|g|^2 x x^T`` keeps what it can of that (the first step towards the nearest Kronecker
product; weights by saliency as in GuidedQuant, arXiv:2505.07004). Weights have a mean of one over a
stack, and a window without gradients counts with ones.
"""

from __future__ import annotations

import torch

from quantcli.layerwise.input_hooks import MatmulInput, OutputGradient
from quantcli.ranks.group import Group


class TokenWeights:
    """Of the stacks of one layer, from the gradients of some windows."""

    def __init__(self) -> None:
        self._squares: dict[tuple[int, str, int], torch.Tensor] = {}
        self._totals: dict[str, tuple[float, int]] = {}

    def add(self, window: int, gradient: OutputGradient) -> None:
        """A stack's product in a window gave ``gradient``."""
        squares = gradient.rows.float().square().sum(dim=1)
        self._squares[window, gradient.name, gradient.matrix] = squares
        total, count = self._totals.get(gradient.name, (0.0, 0))
        self._totals[gradient.name] = total + float(squares.double().sum()), count + len(squares)

    def add_up(self, group: Group) -> None:
        """Have the mean over a stack be that of all ranks' windows."""
        everyone = group.gather(self._totals)
        self._totals = {
            name: (
                sum(totals.get(name, (0.0, 0))[0] for totals in everyone),
                sum(totals.get(name, (0.0, 0))[1] for totals in everyone),
            )
            for name in sorted({name for totals in everyone for name in totals})
        }

    def of(self, window: int, product: MatmulInput) -> torch.Tensor | None:
        """Weights (tokens,) of a product's rows in a window; None where all count alike."""
        squares = self._squares.get((window, product.name, product.matrix))
        total, count = self._totals.get(product.name, (0.0, 0))
        if squares is None or len(squares) != len(product.rows) or not total > 0:
            return None
        return squares * (count / total)
