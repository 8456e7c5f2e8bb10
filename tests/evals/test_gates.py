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
    exact = Gates(
        max_ppl=found.summary.perplexity.value, max_ppl_ratio=against.ratio.value,
        max_kld=against.mean.value, max_kld99=against.quantiles[0.99],
        max_kld999=against.quantiles[0.999], min_top1=against.same_top.value,
        max_rms_dp=against.p_rms.value,
    )  # fmt: skip
    assert [verdict.passed for verdict in judge(exact, [found])] == [True] * 7
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


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    found: np.ndarray = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return found


def _figures() -> dict[str, float]:
    """What is limited, from the logits of `_found`."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (50, 9)).astype(np.float32)
    own = logits + random.normal(0, 0.5, logits.shape).astype(np.float32)
    targets = random.integers(0, 9, 50)
    p, q = _log_softmax(logits), _log_softmax(own)
    divergence = (np.exp(p) * (p - q)).sum(axis=1)
    loss = p[np.arange(50), targets].mean() - q[np.arange(50), targets].mean()
    return {
        "max_ppl_ratio": np.exp(loss),
        "max_kld": divergence.mean(),
        "max_kld99": np.quantile(divergence, 0.99),
        "max_kld999": np.quantile(divergence, 0.999),
        "max_rms_dp": np.sqrt(((np.exp(q) - np.exp(p))[np.arange(50), targets] ** 2).mean()),
        "min_top1": (p.argmax(axis=1) == q.argmax(axis=1)).mean(),
    }


@pytest.mark.parametrize("name", _figures())
def test_each_limit_is_of_its_own_figure(name: str) -> None:
    value = _figures()[name]
    step = -1e-6 if name == "min_top1" else 1e-6
    loose, tight = ({name: value * (1 + sign * step)} for sign in (1, -1))
    (held,) = judge(Gates(**loose), [_found("m")])
    (failed,) = judge(Gates(**tight), [_found("m")])
    assert (held.passed, failed.passed) == (True, False)
    assert held.name == name.replace("_", "-")
    assert failed.value == pytest.approx(value, rel=1e-9)
    assert f"--{held.name} {failed.limit:g}" in failed.sentence


def test_a_perplexity_needs_no_base() -> None:
    verdicts = judge(Gates(max_ppl=1.0), [_found("m", base=False)])
    assert [verdict.passed for verdict in verdicts] == [False]


@pytest.mark.parametrize("name", _figures())
def test_a_divergence_without_a_base_is_a_usage_error(name: str) -> None:
    option = name.replace("_", "-")
    with pytest.raises(UsageError, match=f"--{option} needs a base to compare with"):
        check_gates(Gates(**{name: 0.5}), EvaluationJob([]))


def test_a_percentage_is_no_share() -> None:
    base: Any = object()
    with pytest.raises(UsageError, match="--min-top1 95 is not a share"):
        check_gates(Gates(min_top1=95), EvaluationJob([], reference=base))
