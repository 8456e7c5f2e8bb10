"""Which windows an accelerator takes through a layer at once.

A window of 512 tokens keeps few of a large GPU's units busy. Several go together where a layer is
called alike for all of them and does with each what it does with it alone, which two windows of
every layer show before any is batched. Experts' inputs are weighed window by window, so a layer
with stacks of matrices takes one at a time; so does the CPU, whose results are those of one window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import torch

_TOKENS = 4096
"""Of a batch, about."""
_NEAR = 0.02
"""How far results may be apart, as a share of their length: bfloat16's products are less."""
_REFUSALS = (RuntimeError, ValueError, IndexError, TypeError)


def batch_size(device: torch.device, tokens: int) -> int:
    """Windows of so many tokens that a device takes at once."""
    return 1 if device.type == "cpu" else max(1, _TOKENS // max(1, tokens))


def has_stacks(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether a layer has stacks of matrices."""
    return any(weight.dim() > 2 for weight in weights.values())


def cut_batches(
    windows: Sequence[int], size: int, together: Callable[[int], object]
) -> Iterator[list[int]]:
    """Consecutive windows of which ``together`` gives the same, at most ``size`` at a time."""
    for _, alike in groupby(windows, together):
        found = list(alike)
        for start in range(0, len(found), size):
            yield found[start : start + size]


def runs_batched(
    run: Callable[[torch.Tensor], torch.Tensor], one: torch.Tensor, other: torch.Tensor
) -> bool:
    """Whether ``run`` gives of two windows' states (1, tokens, size) at once what it gives of each.

    Running out of memory is an error all the same.
    """
    try:
        both = run(torch.cat([one, other]))
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS:
        return False
    if len(both) != 2:
        return False
    apart = torch.cat([run(one), run(other)])
    missed = (both - apart).float().flatten(1).norm(dim=1)
    return bool((missed <= _NEAR * apart.float().flatten(1).norm(dim=1)).all())
