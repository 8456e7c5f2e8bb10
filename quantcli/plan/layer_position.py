"""The place (i, n) of a tensor among the layers, from which mixtures take "the first eighth".

llama.cpp counts tensors while it walks through them in file order, so its place is the tensor's
rank among those that its mixture decides: where each layer has one such tensor that is the layer's
index, and a tensor that an override takes out of the mixture does not count. In a model with
experts the feed-forward tensors take the block index of their name instead, except that the types
of one and two bits count ffn_down even there. Ranks are computed here from the sorted names, so
the order in which a checkpoint lists its tensors has no influence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from quantcli.errors import PlanError
from quantcli.plan.model_hparams import Traits
from quantcli.plan.names import VALUE_LIKE, Kind, block_index, kind_of


class Places:
    """The places of all tensors of a model that its mixture decides.

    ``mixed`` are these tensors' names in file order, ``names`` those of all tensors.
    """

    def __init__(
        self, mixed: Sequence[str], names: Iterable[str], traits: Traits, *, low: bool
    ) -> None:
        self._ranks: dict[str, int] = {}
        counts: Counter[Kind] = Counter()
        for name in mixed:
            kind = kind_of(name)
            group = Kind.V if kind in VALUE_LIKE else kind
            self._ranks[name] = counts[group]
            counts[group] += 1
        self._values = sum(kind_of(name) in VALUE_LIKE for name in names)
        self._traits = traits
        self._low = low

    def find(self, name: str, kind: Kind) -> tuple[int, int]:
        """The place (i, n) of the tensor; PlanError when its name should tell and does not."""
        if kind in VALUE_LIKE:
            return self._ranks[name], self._values
        if self._traits.experts > 1 and not self._low:
            return self._block(name), self._traits.blocks
        return self._ranks[name], self._traits.blocks

    def _block(self, name: str) -> int:
        index = block_index(name)
        if index is None or index >= self._traits.blocks:
            raise PlanError(
                f"{name}: expected a name in blk.0 to blk.{self._traits.blocks - 1}, because the "
                "mixture depends on the layer",
                hint="with pure, or with a tensor type for it, the mixture is not asked",
            )
        return index
