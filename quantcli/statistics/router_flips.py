"""What it costs that an error sends a token to another expert, as gradients at the router's logits.

A small error of the router's input changes which experts are chosen where the last chosen and the
first one left out are close. No gradient tells of that, so the Fisher information, taken alone,
has errors run into the router for nothing; of the divergence of a mixture at three bits, a third to
a half is such tokens. With an error of the gap d of variance s^2 the order changes with probability
Phi(-d/s), and the divergence is the cost c of the exchange times that. Its derivative by s^2 is the
weight ``w = c phi(d/s) d / (2 s^3)`` of a squared error of the gap, which joins the Fisher
information when gradients of plus or minus ``sqrt(2 w)`` are added at the two logits, with signs
drawn at random: they go back through all layers like the others, and products of the two kinds
cancel in the mean.

The cost of an exchange is what the last chosen expert adds to the prediction, squared: its weight
times the gradient by it, which is there on the way back. Errors are taken to be of `SPREAD` medians
of the gap, as they are at three bits. Routers that choose by anything else than the order of their
logits (a correction bias, groups) are left as they are.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quantcli.layerwise.walk import LayerPass

ROUTER = "ffn_gate_inp.weight"
"""What GGUF calls a router."""
SPREAD = 0.2
_SEED = 20260105
_CHOICES = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))
"""What modules of experts are called with in transformers."""


class RouterFlips:
    """Adds those gradients in backward passes of one filled layer, each in a ``with`` block."""

    def __init__(self, layer: LayerPass) -> None:
        model = layer.walk.model
        self._routers = {
            name: tensor
            for name, tensor in layer.weights.items()
            if tensor.dim() == 2
            and any(t.name.endswith(ROUTER) for t, _ in model.parameters.targets(name, 0))
        }
        self._experts = [m for m in model.layers[layer.index].modules() if _choice(m)]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Forward and backward of one window."""
        if not self._routers or not self._experts:
            yield
            return
        flips = _Flips(self._routers)
        with ExitStack() as stack:
            for module in self._experts:
                hook = module.register_forward_pre_hook(flips.choose, with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(flips)
            yield


def _choice(module: nn.Module) -> tuple[str, str] | None:
    """What a module of experts calls its experts' numbers and their weights."""
    known = inspect.signature(module.forward).parameters
    return next((pair for pair in _CHOICES if all(name in known for name in pair)), None)


class _Flips(TorchFunctionMode):
    """Sees products with ``routers``, then what the experts behind them are called with."""

    def __init__(self, routers: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._routers = {t.untyped_storage().data_ptr() for t in routers.values()}
        self._last: _Choice | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            func is torch.nn.functional.linear
            and args[1].untyped_storage().data_ptr() in self._routers
            and result.requires_grad
        ):
            self._last = _Choice(result)
        return result

    def choose(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module of experts is called."""
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        index, weights = (bound.get(name) for name in _choice(module) or ())
        last, self._last = self._last, None
        if last is None or not isinstance(weights, torch.Tensor) or index is None:
            return
        if weights.requires_grad and weights.shape == index.shape:
            last.watch(index, weights)


class _Choice:
    """The experts that one router chose; ``logits`` are (..., experts), of a graph."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits.detach().float().flatten(0, -2)
        self._cost: torch.Tensor | None = None
        self._places = self._gap = self._cost_place = torch.empty(0)
        logits.register_hook(self._add)

    def watch(self, index: torch.Tensor, weights: torch.Tensor) -> None:
        """Experts (tokens, chosen) and their ``weights`` in the sum, of the same graph."""
        logits = self._logits
        if len(index) != len(logits) or index.shape[1] >= logits.shape[1]:
            return
        chosen = logits.gather(1, index)
        low, place = chosen.min(dim=1, keepdim=True)
        first, other = logits.scatter(1, index, -math.inf).max(dim=1, keepdim=True)
        self._gap = (low - first)[:, 0]
        self._places = torch.cat([index.gather(1, place), other], dim=1)
        self._cost_place = place
        weight = weights.detach()

        def keep(gradient: torch.Tensor) -> None:
            share = (gradient * weight).float().gather(1, place)[:, 0]
            self._cost = share * share

        weights.register_hook(keep)

    def _add(self, gradient: torch.Tensor) -> torch.Tensor | None:
        if self._cost is None:
            return None
        added = flip_gradients(self._gap, self._cost)
        if added is None:
            return None
        both = torch.stack([added, -added], dim=1)
        whole = torch.zeros_like(self._logits).scatter(1, self._places, both)
        return gradient + whole.reshape(gradient.shape).to(gradient.dtype)


def flip_gradients(gap: torch.Tensor, cost: torch.Tensor) -> torch.Tensor | None:
    """Gradients by the gaps (tokens,) between the last chosen expert and the first left out.

    ``cost`` is what an exchange costs each token; its mean over those that are near one is taken
    for all. None where nothing is near, or a gap is negative (another order decides).
    """
    spread = SPREAD * float(gap.median())
    if spread <= 0 or float(gap.min()) < 0:
        return None
    steps = gap / spread
    near = torch.exp(-steps * steps / 2) * steps
    share = float((near * cost).sum() / near.sum())
    weight = share * near / (math.sqrt(2 * math.pi) * 2 * spread * spread)
    draw = torch.Generator().manual_seed(_SEED)
    signs = torch.randint(0, 2, gap.shape, generator=draw).to(gap.device) * 2 - 1
    return signs * (2 * weight).sqrt()
