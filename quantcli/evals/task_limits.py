"""Limits on tasks: `--min-task NAME=X` holds a task's first metric to at least X."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantcli.errors import UsageError
from quantcli.evals.gates import Verdict
from quantcli.evals.tasks import TaskDone


def read_task_limits(
    given: Sequence[str], limit: int | None, *, has_tasks: bool
) -> dict[str, float]:
    """The limits by task; UsageError for one that is none, and without tasks."""
    if (given or limit is not None) and not has_tasks:
        option = "--min-task" if given else "--task-limit"
        raise UsageError(f"{option} is about tasks", hint="add --tasks NAME")
    if limit is not None and limit < 1:
        raise UsageError(f"--task-limit {limit} is less than 1")
    found = {}
    for entry in given:
        name, _, number = entry.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise UsageError(
                f"--min-task {entry} is not NAME=X", hint="such as --min-task arc_easy=0.7"
            )
    return found


def judge_tasks(least: Mapping[str, float], solved: Sequence[TaskDone]) -> list[Verdict]:
    """Each limit held against each model; UsageError for a task that was not run."""
    verdicts = []
    for name, limit in least.items():
        firsts = {done.artifact.label: done for done in reversed(solved) if done.task == name}
        if not firsts:
            known = dict.fromkeys(done.task for done in solved)
            raise UsageError(
                f"--min-task {name} is of no task that was run", hint=f"one of: {', '.join(known)}"
            )
        for done in reversed(firsts.values()):
            passed = done.value >= limit
            label = done.artifact.label
            verdicts.append(
                Verdict(f"min-task {name}", limit, done.value, passed, label, None, done.metric)
            )
    return verdicts
