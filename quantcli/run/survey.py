"""One survey of what types or schemes cost, for all outputs that choose among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantcli.events import Events
from quantcli.plan.allocate import Costs
from quantcli.run.allocation_targets import Candidates, Target
from quantcli.run.choose_types import Measure


@dataclass
class Survey:
    """Measures, when first asked, all that any of the ``targets`` has to choose among.

    A codec costs the same whatever an output calls it, so it is measured once.
    """

    targets: Sequence[Target]
    measure: Measure
    _costs: Costs | None = None

    def costs(self, candidates: Candidates) -> Events[Costs]:
        """What these cost, by tensor and the candidate's name."""
        if self._costs is None:
            every: Candidates = {}
            for target in self.targets:
                for tensor, kinds in target.candidates.items():
                    own = every.setdefault(tensor, {})
                    own |= {codec.identity: codec for codec in kinds.values()}
            self._costs = yield from self.measure(every)
        found = self._costs
        return {
            tensor: {kind: found[tensor][codec.identity] for kind, codec in kinds.items()}
            for tensor, kinds in candidates.items()
            if tensor in found
        }
