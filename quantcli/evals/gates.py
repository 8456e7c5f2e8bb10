"""Quality gates: limits that a continuous integration run sets on what a quantization may cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from quantcli.errors import GateError, UsageError
from quantcli.evals.artifacts import EvaluatedModel
from quantcli.evals.run import EvaluationDone, EvaluationJob
from quantcli.evals.speed import Speed, SpeedDone
from quantcli.evals.summary import Divergence


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits; None where there is none. ``min_top1`` is a share of the positions, up to 1.

    ``max_ppl_ratio`` is of the perplexity divided by the base's; ``max_kld99`` and ``max_kld999``
    are of the 99 and 99.9 % quantiles of the divergence over positions, in nats, ``max_rms_dp`` of
    the root mean square change of the true token's probability (a share), ``min_greedy`` of the
    agreement on the base's own continuations. The last four are of sizes and speeds: bits per
    weight, bytes of memory, and tokens per second, read and written.
    """

    max_ppl: float | None = None
    max_ppl_ratio: float | None = None
    max_kld: float | None = None
    max_kld99: float | None = None
    max_kld999: float | None = None
    max_rms_dp: float | None = None
    min_top1: float | None = None
    min_greedy: float | None = None
    max_bpw: float | None = None
    max_memory: float | None = None
    min_prompt_speed: float | None = None
    min_speed: float | None = None

    def given(self) -> dict[str, float]:
        """The limits that there are, by the names of their options."""
        limits = {field.name.replace("_", "-"): getattr(self, field.name) for field in fields(self)}
        return {name: limit for name, limit in limits.items() if limit is not None}


_AGAINST: dict[str, tuple[str, Callable[[Divergence], float]]] = {
    "max-ppl-ratio": ("perplexity ratio", lambda found: found.ratio.value),
    "max-kld": ("mean KL divergence", lambda found: found.mean.value),
    "max-kld99": ("99 % quantile of the KL divergence", lambda found: found.quantiles[0.99]),
    "max-kld999": ("99.9 % quantile of the KL divergence", lambda found: found.quantiles[0.999]),
    "max-rms-dp": ("root mean square of Δp", lambda found: found.p_rms.value),
    "min-top1": ("top-1 agreement", lambda found: found.same_top.value),
}
"""What is limited, and where it stands, of the limits that need a base."""

_RUNS: dict[str, tuple[str, Callable[[Speed], float]]] = {
    "max-memory": ("memory in bytes,", lambda speed: speed.memory),
    "min-prompt-speed": ("tokens read per second,", lambda speed: speed.prompt_speed),
    "min-speed": ("tokens written per second,", lambda speed: speed.generation_speed),
}
"""Likewise of those that need ``--speed``."""
_NAMES = {
    "max-ppl": "perplexity", "max-bpw": "bits per weight,", "min-greedy": "greedy agreement",
    **{name: what for name, (what, _) in (*_AGAINST.items(), *_RUNS.items())},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """One limit held against one model on one text; sizes and speeds have no text."""

    name: str
    limit: float
    value: float
    passed: bool
    artifact: str
    text: str | None
    what: str | None = None
    """What was measured, where the limit's name does not tell."""

    @property
    def sentence(self) -> str:
        """What failed."""
        relation = "below" if self.name.startswith("min-") else "above"
        where = self.artifact if self.text is None else f"{self.artifact} on {self.text}"
        joint = "=" if self.what else " "
        limit = f"--{self.name}{joint}{_number(self.limit)}"
        return f"{self.what or _NAMES[self.name]} {self.value:.6g} is {relation} {limit} ({where})"


def _number(value: float) -> str:
    """A limit as it was given; bytes whole."""
    return f"{value:.0f}" if value >= 1e5 else f"{value:g}"


def check_gates(gates: Gates, job: EvaluationJob, *, is_timed: bool = False) -> None:
    """UsageError for limits that cannot be held against this job."""
    for name in gates.given():
        if name in _RUNS and not is_timed:
            raise UsageError(f"--{name} is of a run that is timed", hint="add --speed")
        if name == "min-greedy" and job.greedy is None:
            raise UsageError("--min-greedy needs continuations of the base", hint="add --greedy 64")
        if name in _AGAINST and not job.compares:
            raise UsageError(
                f"--{name} needs a base to compare with",
                hint="add --reference MODEL or --base FILE",
            )
    for name, share in (("--min-top1", gates.min_top1), ("--min-greedy", gates.min_greedy)):
        if share is not None and not 0 <= share <= 1:
            raise UsageError(
                f"{name} {share:g} is not a share between 0 and 1", hint="0.95 stands for 95 %"
            )


def needs_text(gates: Gates) -> list[str]:
    """The limits that a text alone can be held against."""
    return [name for name in gates.given() if name not in _RUNS and name != "max-bpw"]


def judge(
    gates: Gates, results: Sequence[EvaluationDone], models: Sequence[EvaluatedModel] = (),
    speeds: Sequence[SpeedDone] = (),
) -> list[Verdict]:  # fmt: skip
    """Every limit held against every result; a value that is no number fails.

    ``models`` are those whose sizes and speeds count.
    """
    verdicts = []
    for found in results:
        for name, limit in gates.given().items():
            value = _measured(name, found)
            if value is not None:
                verdicts.append(_verdict(name, limit, value, found.artifact.label, found.text))
    labels = [model.label for model in models]
    for name, limit in gates.given().items():
        if name == "max-bpw":
            sizes = [(model.label, model.bits_per_weight) for model in models]
        elif name in _RUNS:
            timed = [done for done in speeds if done.artifact.label in labels]
            sizes = [(done.artifact.label, _RUNS[name][1](done.speed)) for done in timed]
        else:
            continue
        verdicts += [_verdict(name, limit, value, label, None) for label, value in sizes]
    return verdicts


def _measured(name: str, found: EvaluationDone) -> float | None:
    """What a limit of predictions is held against."""
    if name == "max-ppl":
        return found.summary.perplexity.value
    if name == "min-greedy":
        return None if found.greedy is None else found.greedy.agreement.value
    against = found.summary.against
    return _AGAINST[name][1](against) if name in _AGAINST and against is not None else None


def _verdict(name: str, limit: float, value: float, label: str, text: str | None) -> Verdict:
    passed = value >= limit if name.startswith("min-") else value <= limit
    return Verdict(name, limit, value, passed, label, text)


def refuse_failures(verdicts: Sequence[Verdict]) -> None:
    """GateError that names every limit that was not held."""
    failed = [verdict.sentence for verdict in verdicts if not verdict.passed]
    if failed:
        raise GateError("; ".join(failed))
