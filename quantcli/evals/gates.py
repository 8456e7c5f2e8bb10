"""Quality gates: limits that a continuous integration run sets on what a quantization may cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from quantcli.errors import GateError, UsageError
from quantcli.evals.run import EvaluationDone, EvaluationJob
from quantcli.evals.summary import Divergence


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits; None where there is none. ``min_top1`` is a share of the positions, up to 1.

    ``max_ppl_ratio`` is of the perplexity divided by the base's; ``max_kld99`` and ``max_kld999``
    are of the 99 and 99.9 % quantiles of the divergence over positions, in nats.
    """

    max_ppl: float | None = None
    max_ppl_ratio: float | None = None
    max_kld: float | None = None
    max_kld99: float | None = None
    max_kld999: float | None = None
    min_top1: float | None = None

    def given(self) -> dict[str, float]:
        """The limits that there are, by the names of their options."""
        limits = {field.name.replace("_", "-"): getattr(self, field.name) for field in fields(self)}
        return {name: limit for name, limit in limits.items() if limit is not None}


_AGAINST: dict[str, tuple[str, Callable[[Divergence], float]]] = {
    "max-ppl-ratio": ("perplexity ratio", lambda found: found.ratio.value),
    "max-kld": ("mean KL divergence", lambda found: found.mean.value),
    "max-kld99": ("99 % quantile of the KL divergence", lambda found: found.quantiles[0.99]),
    "max-kld999": ("99.9 % quantile of the KL divergence", lambda found: found.quantiles[0.999]),
    "min-top1": ("top-1 agreement", lambda found: found.same_top.value),
}
"""What is limited, and where it stands, of the limits that need a base."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One limit held against one model on one text."""

    name: str
    limit: float
    value: float
    passed: bool
    artifact: str
    text: str

    @property
    def sentence(self) -> str:
        """What failed."""
        relation = "below" if self.name == "min-top1" else "above"
        what = _AGAINST[self.name][0] if self.name in _AGAINST else "perplexity"
        return (
            f"{what} {self.value:.6g} is {relation} --{self.name} {self.limit:g} "
            f"({self.artifact} on {self.text})"
        )


def check_gates(gates: Gates, job: EvaluationJob) -> None:
    """UsageError for limits that cannot be held against this job."""
    for name in gates.given():
        if name in _AGAINST and not job.compares:
            raise UsageError(
                f"--{name} needs a base to compare with", hint="add --reference MODEL or --base"
            )
    if gates.min_top1 is not None and not 0 <= gates.min_top1 <= 1:
        raise UsageError(
            f"--min-top1 {gates.min_top1:g} is not a share between 0 and 1",
            hint="0.95 stands for 95 %",
        )


def judge(gates: Gates, results: Sequence[EvaluationDone]) -> list[Verdict]:
    """Every limit held against every result; a value that is no number fails."""
    verdicts = []
    for found in results:
        against = found.summary.against
        for name, limit in gates.given().items():
            if name not in _AGAINST:
                value = found.summary.perplexity.value
            elif against is not None:
                value = _AGAINST[name][1](against)
            else:
                continue
            passed = value >= limit if name == "min-top1" else value <= limit
            label = found.artifact.label
            verdicts.append(Verdict(name, limit, value, passed, label, found.text))
    return verdicts


def refuse_failures(verdicts: Sequence[Verdict]) -> None:
    """GateError that names every limit that was not held."""
    failed = [verdict.sentence for verdict in verdicts if not verdict.passed]
    if failed:
        raise GateError("; ".join(failed))
