"""Which windows a training fits to and which judge it, in one process or on each of several ranks.

Every eighth window of all is held out, wherever it is. A step takes as many windows as without
ranks, each rank some of its own, or one of each rank where these are more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quantcli.layerwise.hidden_states import WindowsOfRank
from quantcli.ranks.group import Group
from quantcli.statistics.layer_hessians import HELD_OUT


@dataclass(frozen=True)
class TrainingRanks:
    """The ranks that train together, and the windows that are this one's."""

    group: Group
    windows: WindowsOfRank


class WindowShares:
    """Numbers, among this process's ``windows``: ``held_out`` ones, ``fitted`` ones, a batch."""

    def __init__(self, windows: int, ranks: TrainingRanks | None = None) -> None:
        self.total = windows if ranks is None else ranks.windows.total
        self._group = None if ranks is None else ranks.group
        places: Sequence[int] = range(windows) if ranks is None else ranks.windows.numbers
        apart = set(range(HELD_OUT - 1, self.total, HELD_OUT)) or {self.total - 1}
        self._judges = len(apart)
        self.held_out = [i for i, place in enumerate(places) if place in apart]
        self.fitted = [i for i, place in enumerate(places) if place not in apart]
        self._order: list[int] = []

    def seed(self, draw: torch.Generator, seed: int) -> None:
        """Have ``draw`` give each rank an order of its own."""
        draw.manual_seed(seed + (0 if self._group is None else 7919 * self._group.index))

    def batch(self, size: int, draw: torch.Generator) -> list[int]:
        """This process's part of the next ``size`` windows; none where it has none to fit to."""
        if self._group is not None:
            size = max(1, (size + self._group.count - 1 - self._group.index) // self._group.count)
        if not self.fitted:
            return []
        while len(self._order) < size:
            self._order += [
                self.fitted[i] for i in torch.randperm(len(self.fitted), generator=draw)
            ]
        found, self._order = self._order[:size], self._order[size:]
        return found

    def mean(self, total: float) -> float:
        """The mean over all held-out windows, this process's being ``total`` together."""
        if self._group is None:
            return total / self._judges
        return sum(self._group.gather(total)) / self._judges

    def all_of(self, value: bool) -> bool:
        """Whether it is so on every rank."""
        return value if self._group is None else all(self._group.gather(value))

    def add_up(self, gradient: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        if self._group is None:
            return gradient
        values = np.array(gradient.cpu().numpy(), np.float32)
        self._group.add_up(values)
        return torch.from_numpy(values).to(gradient.device)
