"""Gates pass and fail on the right side of their limits, and each failure is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quantcli.errors import GateError, UsageError
from quantcli.evals.gates import Gates, check_gates, judge, refuse_failures
from quantcli.evals.run import EvaluationDone, EvaluationJob
from quantcli.evals.scores import LogitsBase
from quantcli.evals.summary import Tally


def _found(label: str, *, scale: float = 0.5, base: bool = True) -> EvaluationDone:
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (50, 9)).astype(np.float32)
    own = logits + random.normal(0, scale, logits.shape).astype(np.float32)
    targets = random.integers(0, 9, 50)
    tally = Tally()
    nll, compared = LogitsBase(logits).compare(own, targets)
    tally.add(nll, compared if base else None)
    artifact: Any = SimpleNamespace(label=label)
    return EvaluationDone(artifact, "a.txt", 2, tally.summary())


def test_limits_that_are_met_exactly_pass() -> None:
    found = _found("m")
    against = found.summary.against
    assert against is not None
    exact = Gates(found.summary.perplexity.value, against.mean.value, against.same_top.value)
    assert [verdict.passed for verdict in judge(exact, [found])] == [True] * 3
    refuse_failures(judge(exact, [found]))


def test_every_failure_is_named() -> None:
    good, bad = _found("good", scale=0.01), _found("bad", scale=2.0)
    gates = Gates(max_kld=0.01, min_top1=0.9)
    with pytest.raises(GateError) as failed:
        refuse_failures(judge(gates, [good, bad]))
    assert failed.value.exit_code == 3
    assert "mean KL divergence" in failed.value.message
    assert "top-1 agreement" in failed.value.message
    assert failed.value.message.count("(bad on a.txt)") == 2
    assert "good" not in failed.value.message


def test_a_perplexity_needs_no_base() -> None:
    verdicts = judge(Gates(max_ppl=1.0), [_found("m", base=False)])
    assert [verdict.passed for verdict in verdicts] == [False]


@pytest.mark.parametrize("gates", [Gates(max_kld=0.1), Gates(min_top1=0.9)])
def test_a_divergence_without_a_base_is_a_usage_error(gates: Gates) -> None:
    with pytest.raises(UsageError, match="needs a base to compare with"):
        check_gates(gates, EvaluationJob([]))


def test_a_percentage_is_no_share() -> None:
    base: Any = object()
    with pytest.raises(UsageError, match="--min-top1 95 is not a share"):
        check_gates(Gates(min_top1=95), EvaluationJob([], reference=base))
