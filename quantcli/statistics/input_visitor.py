"""Calibration as a walk over layers: statistics of every weight's inputs, one file a layer.

Where they are wanted, those of the keys and values that a layer puts into a cache come along.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

from quantcli.layerwise.cache_totals import CacheTotals, add_caches
from quantcli.layerwise.cache_watch import CacheWatch
from quantcli.layerwise.checkpoint import Checkpoint
from quantcli.layerwise.hidden_states import HiddenStateCache
from quantcli.layerwise.model_run import ModelRun
from quantcli.layerwise.walk import LayerPass, LayerWalk, Visitor
from quantcli.statistics.collector import Collector
from quantcli.statistics.input_statistics import CACHE
from quantcli.statistics.layer_statistics import save_statistics
from quantcli.types import Event, Progress


@dataclass
class InputVisitor(Visitor):
    """Collects ``needs`` of all weights' inputs; the head counts as one layer more."""

    walk: LayerWalk[HiddenStateCache]
    needs: tuple[str, ...]
    checkpoint: Checkpoint
    run: ModelRun
    _caches: CacheWatch = field(default_factory=CacheWatch)

    def layer(self, layer: LayerPass) -> Iterator[Event]:
        """Observe what the layer's weights are multiplied with."""
        module = self.walk.model.layers[layer.index]
        watch = self._caches.watch(module) if CACHE in self.needs else nullcontext()
        with self._collector(f"layer {layer.index}") as collector, watch as cache:
            yield from layer.forward(collector.watch)
            totals = None if cache is None else cache.totals()
            self._save(layer.index, collector, totals)

    def head(self) -> Iterator[Event]:
        """The output head's input; its weights are not needed for it."""
        model = self.walk.model
        with self._collector("the output head") as collector:
            for number in self.walk.windows:
                collector.watch(number)(model.head_input(self.walk.get(number)))
            self._save(len(model.layers), collector)
        whole = model.layer_starts[-1]
        yield Progress(whole, whole, "output")

    def _collector(self, place: str) -> Collector:
        targets = self.walk.model.parameters.targets
        return Collector(targets, self.needs, self.run.folder, place)

    def _save(self, layer: int, collector: Collector, cache: CacheTotals | None = None) -> None:
        """Store what was seen of a layer; by the first of several ranks what all have seen."""
        ranks = self.run.ranks
        if ranks is not None:
            collector.settle(ranks.group)
            collector.add_up(ranks.group, lambda home, matrix: [0])
            cache = add_caches(ranks.group.gather(cache))
        if self.checkpoint.writes:
            save_statistics(self.checkpoint, layer, collector, cache)
        if ranks is not None:
            ranks.group.wait()
