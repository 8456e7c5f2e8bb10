"""What attention puts into a key-value cache, seen where transformers puts it there.

A stand-in for the cache is handed to each attention module for the time of a ``with`` block: it
notes the keys, after rotary embeddings, and the values, and hands them back. Layers that attend to
an earlier layer's keys and values (Gemma 3n and 4) store none and count as that layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import DynamicCache

from quantcli.layerwise.cache_totals import CacheTotals

_PAST = ("past_key_values", "past_key_value", "layer_past")
"""What attention modules of transformers call the cache that they are given."""
_MAKES_KEYS = ("k_proj", "qkv_proj", "kv_b_proj", "query_key_value", "c_attn", "Wqkv")


class CacheWatch:
    """Watches the layers of a model, one after the other."""

    def __init__(self) -> None:
        self._by_type: dict[str, CacheTotals] = {}

    @contextmanager
    def watch(self, layer: nn.Module) -> Iterator[LayerCache]:
        """Watch a layer; ask for `LayerCache.totals` before the next."""
        modules = [module for module in layer.modules() if _is_attention(module)]
        seen = LayerCache(modules, self._by_type)
        with ExitStack() as stack:
            for module in modules:
                hook = module.register_forward_pre_hook(
                    partial(_hand_over, cache=_StandIn(seen), name=_cache_name(module)),
                    with_kwargs=True,
                )
                stack.callback(hook.remove)
            yield seen


class LayerCache:
    """What one layer's attention ``modules`` stored; ``by_type`` are the last layers of a type."""

    def __init__(self, modules: list[nn.Module], by_type: dict[str, CacheTotals]) -> None:
        self._modules = modules
        self._by_type = by_type
        self._found: CacheTotals | None = None

    def add(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """States of some tokens, (1, heads, tokens, size)."""
        tokens = np.array([keys.shape[-2]], np.int64)
        new = CacheTotals(tokens, _largest(keys), _largest(values))
        old = self._found
        if old is not None:
            new = CacheTotals(
                old.tokens + tokens, np.maximum(old.keys, new.keys),
                np.maximum(old.values, new.values),
            )  # fmt: skip
        self._found = new

    def totals(self) -> CacheTotals | None:
        """All of it; None for a layer without a cache."""
        kinds = [str(getattr(module, "layer_type", "")) for module in self._modules]
        if self._found is not None:
            self._by_type |= dict.fromkeys(kinds, self._found)
            return self._found
        if not any(getattr(module, "is_kv_shared_layer", False) for module in self._modules):
            return None
        return next((self._by_type[kind] for kind in kinds if kind in self._by_type), None)


class _StandIn(DynamicCache):
    """An empty cache that stays so."""

    def __init__(self, seen: LayerCache) -> None:
        super().__init__()
        self._seen = seen

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._seen.add(key_states, value_states)
        return key_states, value_states


def _largest(states: torch.Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = (
        states.detach().abs().amax(dim=(0, -2, -1)).double().cpu().reshape(-1).numpy()
    )
    return found


def _cache_name(module: nn.Module) -> str:
    known = inspect.signature(module.forward).parameters
    return next((name for name in _PAST if name in known), "")


def _is_attention(module: nn.Module) -> bool:
    makes_keys = any(hasattr(module, name) for name in _MAKES_KEYS)
    shares = getattr(module, "is_kv_shared_layer", False) and hasattr(module, "q_proj")
    # MiniMax's lightning attention keeps a state in the cache instead of keys and values.
    is_linear = getattr(module, "layer_type", None) == "linear_attention"
    return bool((makes_keys or shares) and _cache_name(module) and not is_linear)


def _hand_over(
    module: nn.Module, args: Any, kwargs: dict[str, Any], *, cache: Any, name: str
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, name: cache}
