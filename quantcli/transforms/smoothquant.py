"""SmoothQuant: move outliers from activations into weights, where 8 bits hold them.

When inputs are rounded token by token to 8 bits, one channel that is a hundred times larger than
the rest costs the others all their precision. A channel's inputs are divided, and its weights
multiplied, by max|x|^alpha / max|W|^(1 - alpha); alpha is given, or searched for each group.

Only inputs behind norms are smoothed. Inside attention and MLP a few tokens are huge, not a few
channels; rounding token by token keeps those apart already, and smoothing by them would take the
ordinary tokens' precision from the weights (measured: it made W8A8 six times worse).

The search minimises the output error of rounded weights *and* rounded inputs. Inputs that are
rounded to a step d are off by d^2/12 on the mean; d follows from the largest channel of a token,
whose mean square is bounded through the moments of normal channels with the measured variances,
and by the largest values seen. Source: SmoothQuant (arXiv:2211.10438).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from quantcli.archs.fold import FoldGroup
from quantcli.errors import PlanError, UsageError
from quantcli.formats.base import Floats
from quantcli.model import Model
from quantcli.statistics.input_statistics import InputStatistics
from quantcli.transforms.base import GroupOutcome, TransformOptions
from quantcli.transforms.channel_scales import collect, model_groups
from quantcli.transforms.output_error import ConsumerMatrix, RoundRows, open_consumers
from quantcli.transforms.scale_search import GroupPart, Scales, choose, search_groups
from quantcli.types import Event

_ALPHAS = tuple(step / 20 for step in range(21))
_MARGIN = 0.01
_LEVELS = 127
"""Of a symmetric 8-bit grid, on either side of zero."""
_SMALLEST = 1e-5
"""Of a maximum, so that dead channels neither vanish nor explode."""


class _SmoothQuant:
    """SmoothQuant as a `Transform`."""

    name = "smoothquant"
    options = ("alpha", "margin", "threads")
    needs = ("hessian", "abs_max")

    def check(self, model: Model, earlier: Sequence[str]) -> None:
        """PlanError after a rotation, which leaves no outlier channels."""
        if "rotate" in earlier:
            raise PlanError(
                "smoothquant after rotate finds no outlier channels, and cannot know the largest "
                "inputs, which a rotation mixes",
                hint="one of the two, or smoothquant first",
            )

    def find(
        self, model: Model, grids: Mapping[str, RoundRows], statistics: InputStatistics,
        options: TransformOptions,
    ) -> Iterator[Event]:  # fmt: skip
        """Smooth the inputs of the tensors in ``grids``, yielding progress and `TransformFound`.

        With an alpha (0 to 1) every group behind a norm is smoothed by it, as in the paper.
        Without, alpha is searched for each of them, and a group is smoothed if that lowers its
        loss by the margin.
        """
        alpha = options.alpha
        if alpha is not None and not 0 <= alpha <= 1:
            raise UsageError(f"alpha is {alpha:g}", hint="from 0 to 1; often 0.5 to 0.9")
        groups = [
            group
            for group in model_groups(model)
            if group.kind == "norm" and any(name in grids for name in group.consumers)
        ]
        alphas = _ALPHAS if alpha is None else (alpha,)
        margin = _MARGIN if options.margin is None else options.margin
        least = margin if alpha is None else -math.inf

        def search(group: FoldGroup, matrix: int) -> tuple[Scales, GroupOutcome] | None:
            consumers = open_consumers(model, group, matrix, statistics, grids, weighted=False)
            if not consumers:
                return None
            part = GroupPart(group, matrix, consumers)
            largest = _largest_inputs(group, consumers, statistics)
            weights = collect(group, _largest_weights(consumers)[None], np.max)[0]
            candidates = {
                f"alpha {a:g}": np.maximum(largest**a / weights ** (1 - a), _SMALLEST)
                for a in alphas
            }
            seen = {
                consumer: statistics.abs_max(consumer.tensor.name, consumer.matrix)
                for consumer in consumers
            }

            def loss(consumer: ConsumerMatrix, rows: Floats, columns: Scales) -> float:
                step = token_step(consumer.hessian.diagonal(), seen[consumer], columns)
                scaled = np.square(rows * columns).sum(dtype=np.float64)
                return consumer.error(rows, columns) + step**2 / 12 * float(scaled)

            return choose(part, candidates, loss, least)

        settings = {"alpha": alpha, "margin": margin}
        return search_groups("smoothquant", model, groups, search, settings, options.threads)


SMOOTHQUANT = _SmoothQuant()


def token_step(
    squares: NDArray[np.floating], largest: NDArray[np.floating], columns: Scales
) -> float:
    """The root mean square of a token's step when inputs are divided by ``columns``.

    ``squares`` are the inputs' mean squares, ``largest`` their largest magnitudes. For normal x
    and any p, the mean of max x^2 is at most the p-th root of the sum of the 2p-th moments.
    """
    variances = squares.astype(np.float64) / columns**2
    top = max(float(variances.max()), 1e-300)
    bounds = []
    for power in range(1, max(2, round(math.log(len(variances))) + 1)):
        moments = math.prod(range(1, 2 * power, 2)) * float(((variances / top) ** power).sum())
        bounds.append(top * moments ** (1 / power))
    seen = float(np.max(largest / columns)) ** 2
    return math.sqrt(min(*bounds, seen)) / _LEVELS


def _largest_inputs(
    group: FoldGroup, consumers: list[ConsumerMatrix], statistics: InputStatistics
) -> Scales:
    """The largest |x| of each channel over all consumers; experts see different tokens."""
    found = [statistics.abs_max(consumer.tensor.name, consumer.matrix) for consumer in consumers]
    top = np.maximum.reduce(found).astype(np.float64)
    return np.asarray(np.maximum(collect(group, top[None], np.max)[0], _SMALLEST))


def _largest_weights(consumers: list[ConsumerMatrix]) -> Scales:
    """The largest |w| of each column over all consumers."""
    top: Scales = np.full(consumers[0].tensor.columns, _SMALLEST)
    for consumer in consumers:
        for rows in consumer.slabs():
            np.maximum(top, np.abs(rows).max(axis=0), out=top)
    return top
