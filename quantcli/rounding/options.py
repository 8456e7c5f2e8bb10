"""Options of calibrated methods, and the outcome for each tensor."""

from __future__ import annotations

from dataclasses import dataclass, fields

from quantcli.plan.recipe import FIELDS, usual
from quantcli.plan.recipe_defaults import USUAL_ROUNDER
from quantcli.statistics.hessian import Hessian
from quantcli.types import Event

BLOCK_SWEEPS = 2
"""Sweeps over 256 columns before the next ones are rounded. A third gains a hundredth."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a method works; a field that a recipe has too means the same here and is declared there.

    ``propagate`` calibrates each layer on the outputs of the quantized layers before it, and
    corrects the target for their error. ``rounder`` names what chooses the codes, ``trainer`` what
    trains each rounded layer for ``tune_steps`` steps, if anything does; ``e2e`` trains block
    scales and norms of the whole model at the end, for ``e2e_steps`` steps, and with ``e2e_codes``
    its codes. ``fisher_windows``
    windows are run backward to estimate the outputs' Fisher information; with 0 of them rows are
    independent. ``block_sweeps`` sweeps go over some columns of a block format before the next are
    rounded.
    """

    damping: float = usual("damping")
    column_order: str = usual("column_order")
    sweeps: int = usual("sweeps")
    block_sweeps: int = BLOCK_SWEEPS
    propagate: bool = False
    rounder: str = USUAL_ROUNDER
    trainer: str | None = None
    tune_steps: int = usual("tune_steps")
    fisher_windows: int = usual("fisher_windows")
    e2e: bool = False
    e2e_codes: bool = True
    e2e_steps: int = usual("e2e_steps")

    def sweeps_after(self, hessian: Hessian) -> int:
        """Sweeps over all columns; out of order there were none on the way, so they follow now."""
        return self.sweeps + (self.block_sweeps if hessian.order is not None else 0)

    def check(self) -> None:
        """UsageError for a value that makes no sense."""
        for name in DECLARED:
            FIELDS[name].refuse_wrong(getattr(self, name))


DECLARED = tuple(
    field.name
    for field in fields(Options)
    if field.name in FIELDS and FIELDS[field.name].usual is not None
)
"""The options that a recipe declares under the same name, with a default and limits."""


@dataclass(frozen=True, slots=True)
class Outcome(Event):
    """The outcome for one tensor.

    Losses are the outputs' squared error on held-out inputs, weighed by the outputs' Fisher
    information where that is known, as a fraction of the outputs' squares: ``before`` of rounding
    to nearest with importance weights, ``after`` of the result taken. Those of wide matrices are
    estimates (`quantcli.statistics.sketched_loss`). ``kept`` counts matrices in which rounding to
    nearest was better and stayed.
    """

    tensor: str
    format: str
    method: str
    before: float
    after: float
    matrices: int = 1
    kept: int = 0

    @property
    def details(self) -> tuple[str, ...]:
        """The losses in a sentence."""
        kept = f", {self.kept} kept" if self.kept else ""
        return (
            f"{self.tensor} {self.format}: held-out loss {self.before:.3g} -> "
            f"{self.after:.3g}{kept}",
        )

    @property
    def fields(self) -> dict[str, object]:
        """The same as plain data."""
        return {
            "tensor": self.tensor,
            "type": self.format,
            "method": self.method,
            "loss_before": self.before,
            "loss_after": self.after,
            "matrices": self.matrices,
            "kept": self.kept,
        }
