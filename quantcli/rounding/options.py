"""What a calibrated method may be told, and what comes of its run."""

from __future__ import annotations

from dataclasses import dataclass

from quantcli.errors import UsageError
from quantcli.statistics.hessian import DAMPING, ORDERS, Hessian
from quantcli.types import Event

HELD_OUT = 8
"""Every so many windows one is kept from the fit, to judge it."""
FISHER_WINDOWS = 40
"""Windows whose gradients tell what outputs matter."""
FEWEST_FISHER = 16
"""What the embedding needs in any case."""
BLOCK_SWEEPS = 2
"""Sweeps over 256 columns before the next ones are rounded. A third gains a hundredth."""
TUNE_STEPS = 150
"""Of training a layer."""
E2E_STEPS = 120
"""Of training the whole model."""


@dataclass(frozen=True, slots=True)
class Options:
    """How GPTQ works: damping, column order, sweeps of descent, and whose inputs it sees.

    ``propagate`` takes the inputs that the already quantized layers give, and corrects the target
    for what they lost. Without ``feedback`` the encoder rounds, by importance weights; ``tune``
    trains each layer after it was rounded, for ``tune_steps`` steps; ``e2e`` trains the factors
    and norms of the whole model at the end, for ``e2e_steps`` steps. ``fisher_windows`` windows
    go backwards to tell what outputs matter; with 0 of them rows are rounded each by itself.
    ``block_sweeps`` sweeps go over some columns of a block format before the next are rounded.
    """

    damping: float = DAMPING
    order: str = "natural"
    sweeps: int = 1
    block_sweeps: int = BLOCK_SWEEPS
    propagate: bool = False
    feedback: bool = True
    tune: bool = False
    tune_steps: int = TUNE_STEPS
    fisher_windows: int = FISHER_WINDOWS
    e2e: bool = False
    e2e_steps: int = E2E_STEPS

    def sweeps_after(self, hessian: Hessian) -> int:
        """Sweeps over all columns; out of order there were none on the way, so they follow now."""
        return self.sweeps + (self.block_sweeps if hessian.order is not None else 0)

    def check(self) -> None:
        """UsageError for a value that makes no sense."""
        if not 0 < self.damping <= 1:
            raise UsageError(f"a damping of {self.damping:g} is not above 0 and at most 1")
        if self.order not in ORDERS:
            raise UsageError(
                f"there is no column order {self.order!r}", hint=f"there are {', '.join(ORDERS)}"
            )
        if self.sweeps < 0:
            raise UsageError(f"{self.sweeps} sweeps are not possible", hint="0 or more")
        if self.fisher_windows < 0:
            raise UsageError(
                f"{self.fisher_windows} windows of gradients are not possible", hint="0 or more"
            )
        if self.tune_steps < 1:
            raise UsageError(
                f"{self.tune_steps} steps of tuning are not possible", hint="1 or more"
            )
        if self.e2e_steps < 1:
            raise UsageError(
                f"{self.e2e_steps} steps of training end to end are not possible", hint="1 or more"
            )


@dataclass(frozen=True, slots=True)
class Outcome(Event):
    """What became of one tensor.

    Losses are the outputs' squared error on held-out inputs, weighed by what predictions make of
    it where that is known, as a share of the outputs' own squares: ``before`` of the encoder
    alone with importance weights, ``after`` of what was taken. ``kept`` counts matrices in which
    the encoder's own result was better and stayed.
    """

    tensor: str
    format: str
    method: str
    before: float
    after: float
    matrices: int = 1
    kept: int = 0
