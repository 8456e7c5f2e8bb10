"""Tasks of EleutherAI's lm-evaluation-harness on a model in one of our engines.

The harness builds the questions and scores the answers; we tell it how likely a model finds a
continuation. So tasks by likelihood run (multiple choice, perplexity), and those that let the model
write are refused. A request longer than the context loses its beginning, as the harness does it.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantcli.errors import MissingExtraError, QuantcliError, SourceError, UsageError
from quantcli.evals.artifacts import EvaluatedModel
from quantcli.evals.engines.base import Engine
from quantcli.evals.scores import log_softmax
from quantcli.evals.windows import Tokens, Window
from quantcli.types import Event, Progress

INSTALL = "pip install lm_eval"
CONTEXT = 2048
_BY_LIKELIHOOD = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")


@dataclass(frozen=True, slots=True)
class TaskDone(Event):
    """A metric of one task; ``error`` is the harness's standard error, None where it has none."""

    artifact: EvaluatedModel
    task: str
    metric: str
    value: float
    error: float | None


@dataclass(frozen=True)
class Tasks:
    """What is to be run: ``names`` as the user gave them, ``loaded`` as the harness knows them."""

    names: tuple[str, ...]
    loaded: Any
    limit: int | None


def load_tasks(names: Sequence[str], limit: int | None) -> Tasks:
    """The tasks, before any model is loaded.

    A name is a task's, a group's or a YAML file's. MissingExtraError without the library,
    UsageError for a name that it does not know, SourceError for data that it cannot get.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtraError("--tasks runs lm-eval, which is not here", hint=INSTALL) from None
    wanted = tuple(part.strip() for name in names for part in name.split(",") if part.strip())
    if not wanted:
        raise UsageError("--tasks names no task", hint="such as --tasks arc_easy,hellaswag")
    with _quietly():
        manager = TaskManager()
        known = set(manager.all_tasks)
        for name in wanted:
            if name not in known and not name.endswith((".yaml", ".yml")):
                raise UsageError(
                    f"lm-eval has no task {name}",
                    hint="'lm-eval ls tasks' lists them; a file of one's own ends in .yaml",
                )
        try:
            loaded = manager.load(list(wanted))
        except Exception as error:  # whatever its data sets raise
            raise SourceError(
                f"lm-eval cannot load {', '.join(wanted)}: {_first_line(error)}",
                hint="its data come from the Hub, or from where its YAML file says",
            ) from error
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE not in _BY_LIKELIHOOD:
            raise UsageError(
                f"the task {name} lets the model write ({task.OUTPUT_TYPE}), and --tasks compares "
                "likelihoods",
                hint="multiple-choice tasks such as arc_easy, hellaswag or mmlu can be run",
            )
    return Tasks(wanted, loaded, limit)


def run_tasks(
    tasks: Tasks, artifacts: Sequence[EvaluatedModel], *, context: int | None, threads: int,
    device: str | None = None,
) -> Iterator[Event]:  # fmt: skip
    """Run every task on each model, yielding a `TaskDone` for each metric."""
    for number, artifact in enumerate(artifacts):
        yield Progress(number, len(artifacts), f"{artifact.label}, {', '.join(tasks.names)}", "")
        trained = artifact.model.count("context_length")
        length = context or min(CONTEXT, trained or CONTEXT)
        with closing(artifact.load(length, threads, device)) as engine:
            results = _evaluate(engine, tasks, length)
        for task, found in results.items():
            for key, value in found.items():
                metric, joint, rule = key.partition(",")
                # What has no filter's name behind it is a count or a title.
                if not joint or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                shown = metric if rule == "none" else f"{metric} ({rule})"
                error = _number(found.get(f"{metric}_stderr,{rule}"))
                yield TaskDone(artifact, task, shown, float(value), error)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _evaluate(engine: Engine, tasks: Tasks, length: int) -> dict[str, dict[str, Any]]:
    import lm_eval
    from lm_eval.api.model import LM

    class InEngine(LM):
        """The harness's view of an engine."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return [score(engine, r.args[0], r.args[1], length) for r in requests]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return [score_rolling(engine, request.args[0], length) for request in requests]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            raise UsageError("--tasks compares likelihoods")

    with _quietly():
        try:
            found = lm_eval.simple_evaluate(
                model=InEngine(), tasks=list(tasks.names), limit=tasks.limit, log_samples=False,
                bootstrap_iters=1000,
            )  # fmt: skip
        except QuantcliError:
            raise
        except Exception as error:  # whatever a task's own code raises
            raise SourceError(
                f"lm-eval stopped in {', '.join(tasks.names)}: {_first_line(error)}"
            ) from error
    results: dict[str, dict[str, Any]] = found["results"]
    return results


def score(engine: Engine, before: str, text: str, length: int) -> tuple[float, bool]:
    """The log-probability of ``text`` after ``before``, and whether it is the greedy one.

    Spaces at the end of ``before`` belong to ``text``, so that both are cut into tokens as one.
    """
    bare = before.rstrip(" ")
    whole = engine.tokenize(before + text)
    known = len(engine.tokenize(bare)) if bare else int(engine.begin is not None)
    # Without anything before it, the first token can only be given.
    first = max(1, min(known, len(whole) - 1))
    total, greedy = _read(engine, whole[-(length + 1) :], len(whole) - first)
    return total, greedy


def score_rolling(engine: Engine, text: str, length: int) -> float:
    """The log-probability of a whole text, in windows of which each begins with one token known."""
    whole, total = engine.tokenize(text), 0.0
    for start in range(0, len(whole) - 1, length):
        part = whole[start : start + length + 1]
        total += _read(engine, part, len(part) - 1)[0]
    return total


def _read(engine: Engine, tokens: Tokens, scored: int) -> tuple[float, bool]:
    scored = min(scored, len(tokens) - 1)
    if scored < 1:
        return 0.0, True
    targets = tokens[-scored:].astype(np.int64)
    window = Window(tokens[:-1], len(tokens) - 1 - scored, targets)
    total, greedy, place = 0.0, True, 0
    for logits in engine.run([window]):
        some = targets[place : place + len(logits)]
        total += float(np.take_along_axis(log_softmax(logits), some[:, None], axis=1).sum())
        greedy = greedy and bool((logits.argmax(axis=1) == some).all())
        place += len(logits)
    return total, greedy


@contextmanager
def _quietly() -> Iterator[None]:
    """The harness logs and draws bars of its own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
