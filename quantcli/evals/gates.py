"""Quality gates: limits that a continuous integration run sets on what a quantization may cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantcli.errors import GateError, UsageError
from quantcli.evals.run import EvaluationDone, EvaluationJob


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits; None where there is none. ``min_top1`` is a share of the positions, up to 1."""

    max_ppl: float | None = None
    max_kld: float | None = None
    min_top1: float | None = None


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
        what = {
            "max-ppl": "perplexity", "max-kld": "mean KL divergence", "min-top1": "top-1 agreement"
        }[self.name]  # fmt: skip
        return (
            f"{what} {self.value:.6g} is {relation} --{self.name} {self.limit:g} "
            f"({self.artifact} on {self.text})"
        )


def check_gates(gates: Gates, job: EvaluationJob) -> None:
    """UsageError for limits that cannot be held against this job."""
    for name, limit in (("max-kld", gates.max_kld), ("min-top1", gates.min_top1)):
        if limit is not None and not job.compares:
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
        values = [("max-ppl", gates.max_ppl, found.summary.perplexity.value)]
        if against is not None:
            values += [
                ("max-kld", gates.max_kld, against.mean.value),
                ("min-top1", gates.min_top1, against.same_top.value),
            ]
        for name, limit, value in values:
            if limit is not None:
                passed = value >= limit if name == "min-top1" else value <= limit
                label = found.artifact.label
                verdicts.append(Verdict(name, limit, value, passed, label, found.text))
    return verdicts


def refuse_failures(verdicts: Sequence[Verdict]) -> None:
    """GateError that names every limit that was not held."""
    failed = [verdict.sentence for verdict in verdicts if not verdict.passed]
    if failed:
        raise GateError("; ".join(failed))
