"""What an evaluation found: a comparison table for people, every figure for programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quantcli.evals.artifacts import EvaluatedModel
from quantcli.evals.bands import LIKE, WORDS, judge_divergence
from quantcli.evals.gates import Verdict
from quantcli.evals.run import EvaluationDone, EvaluationJob
from quantcli.evals.speed import GENERATION, PROMPT, Speed, SpeedDone
from quantcli.evals.summary import Divergence, Estimate
from quantcli.evals.tasks import TaskDone
from quantcli.report.against_base import by_confidence, by_text, details, pair
from quantcli.report.tables import Column, Table
from quantcli.report.units import number_text, percent_text, size_text

_LOWER_BOUND = (
    "The compact base leaves out part of the divergence: its figures are lower bounds, and all "
    "others are exact."
)


def evaluation_tables(
    job: EvaluationJob, results: Sequence[EvaluationDone], speeds: Sequence[SpeedDone] = (),
    solved: Sequence[TaskDone] = (),
) -> list[Table]:  # fmt: skip
    """A comparison for each text, and the details where a single model was held against a base.

    Several texts stand side by side at the end, where there is a base. Without texts, the models'
    speeds alone.
    """
    tasks = [_tasks(solved)] if solved else []
    if not results:
        return [*([_speeds(speeds)] if speeds else []), *tasks]
    tables = []
    floors = {found.text: found for found in results if found.is_floor}
    results = [found for found in results if not found.is_floor]
    for text in dict.fromkeys(found.text for found in results):
        rows = [found for found in results if found.text == text]
        tables.append(_comparison(job, text, rows, speeds, floors.get(text)))
        if len(rows) == 1 and rows[0].summary.against is not None:
            tables.append(details(rows[0].summary.against))
            tables.append(by_confidence(rows[0].summary.against))
    if job.compares and len({found.text for found in results}) > 1:
        tables.append(by_text(results))
    return tables + tasks


_MODEL = (Column("model"), Column("size", "right"), Column("bits/weight", "right", drop=5))
_SPEED = (
    Column("memory", "right", drop=1),
    Column("in t/s", "right"),
    Column("out t/s", "right"),
)
_PERPLEXITY = (Column("perplexity", "right"), Column("±", "right", drop=6))
_AGAINST = (
    Column("KLD mean", "right"),
    Column("±", "right", drop=7),
    Column("99 %", "right", drop=2),
    Column("99.9 %", "right", drop=3),
    Column("same top", "right"),
)


def _speeds(speeds: Sequence[SpeedDone]) -> Table:
    rows = tuple((*_named(done.artifact), *_speed_cells(done.speed)) for done in speeds)
    return Table((*_MODEL, *_SPEED), rows, title=_speed_title(speeds))


def _tasks(solved: Sequence[TaskDone]) -> Table:
    columns = (
        Column("model"), Column("task"), Column("metric"), Column("value", "right"),
        Column("±", "right", drop=1),
    )  # fmt: skip
    rows = tuple(
        (
            done.artifact.label, done.task, done.metric, f"{done.value:.4f}",
            "" if done.error is None else f"{done.error:.4f}",
        )
        for done in solved
    )  # fmt: skip
    return Table(columns, rows, title="Tasks of lm-eval")


def _speed_title(speeds: Sequence[SpeedDone]) -> str:
    threads = speeds[0].speed.threads
    return (
        f"Tokens per second: {PROMPT} in, {GENERATION} out, medians of "
        f"{len(speeds[0].speed.prompt)} runs on {threads} thread{'s' * (threads > 1)}, llama.cpp"
    )


def _named(artifact: EvaluatedModel) -> tuple[str, ...]:
    size = size_text(artifact.nbytes)
    return artifact.label, size, f"{artifact.bits_per_weight:.2f}"


def _speed_cells(speed: Speed | None) -> tuple[str, ...]:
    if speed is None:
        return "", "", ""
    return (
        size_text(speed.memory),
        _rate_text(speed.prompt_speed),
        _rate_text(speed.generation_speed),
    )


def _rate_text(rate: float) -> str:
    """Tokens per second in three digits, or whole ones."""
    return f"{rate:,.0f}" if rate >= 99.95 else number_text(rate)


def _comparison(
    job: EvaluationJob, text: str, results: Sequence[EvaluationDone], speeds: Sequence[SpeedDone],
    floor: EvaluationDone | None,
) -> Table:  # fmt: skip
    by_label = {done.artifact.label: done.speed for done in speeds}
    columns = [*_MODEL, *(_SPEED if speeds else ()), *_PERPLEXITY]
    columns += _AGAINST if job.compares else ()
    columns += [Column("greedy", "right", drop=4)] if job.greedy else []
    blanks = [""] * bool(job.greedy)
    rows: list[tuple[str, ...]] = []
    first = results[0].summary.against
    if first is not None:
        stored = str(job.base.path) if job.base else ""
        origin = job.reference
        name = _named(origin) if origin else (stored, "", "")
        speed = _speed_cells(by_label.get(origin.label) if origin else None) if speeds else ()
        both = pair(first.base_perplexity, 4)
        rows.append((*name, *speed, *both, "base", *[""] * (len(_AGAINST) - 1), *blanks))
    for found in [*([floor] if floor is not None else ()), *results]:
        artifact, against = found.artifact, found.summary.against
        name = (f"noise floor ({artifact.engine})", "", "") if found.is_floor else _named(artifact)
        timed = None if found.is_floor else by_label.get(artifact.label)
        speed = _speed_cells(timed) if speeds else ()
        row = (*name, *speed, *pair(found.summary.perplexity, 4))
        if against is not None:
            row += (
                *pair(against.mean, 5),
                f"{against.quantiles[0.99]:.4f}",
                f"{against.quantiles[0.999]:.4f}",
                percent_text(against.same_top.value),
            )
        if found.greedy is not None:
            row += (percent_text(found.greedy.agreement.value),)
        rows.append(row)
    some = results[0]
    way = f"stride {job.stride}" if job.stride else "second half of each window"
    engines = ", ".join(dict.fromkeys(found.artifact.engine for found in results))
    title = (
        f"{text}: {some.windows} window{'s' * (some.windows != 1)} of {job.length} tokens, "
        f"{some.summary.positions} scored ({way}), {engines}"
    )
    notes = [_speed_title(speeds)] if speeds else []
    if first is not None:
        notes += _judgements(results)
        notes += _near_the_floor(floor, results)
        notes += _greedy_note(results)
        notes += [_LOWER_BOUND] if first.ceiling is not None else []
    return Table(tuple(columns), tuple(rows), title=title, note="\n".join(notes) or None)


def _near_the_floor(
    floor: EvaluationDone | None, results: Sequence[EvaluationDone]
) -> Iterator[str]:
    """Which divergences are, for a good part, what the runtimes' rounding does."""
    if floor is None or floor.summary.against is None:
        return
    least = 2 * floor.summary.against.mean.value
    near = [
        Path(found.artifact.label).name
        for found in results
        if found.summary.against is not None and found.summary.against.mean.value < least
    ]
    if near:
        yield f"Less than twice the noise floor, so hardly the weights' doing: {', '.join(near)}"


def _greedy_note(results: Sequence[EvaluationDone]) -> Iterator[str]:
    """How far the models write what the base writes."""
    alike = [
        f"{Path(found.artifact.label).name} {found.greedy.alike.value:.1f}"
        for found in results
        if found.greedy is not None
    ]
    first = results[0].greedy
    if first is not None:
        yield (
            f"Of {first.tokens} tokens that the base writes after {first.prompts} prompts, as many "
            f"are written alike before the first other one: {', '.join(alike)}"
        )


def _judgements(results: Sequence[EvaluationDone]) -> Iterator[str]:
    """Who is how close to the base, a line for each word."""
    named: dict[int, list[str]] = defaultdict(list)
    for found in results:
        if found.summary.against is not None:
            place = judge_divergence(found.summary.against).overall
            named[place].append(Path(found.artifact.label).name)
    for number, place in enumerate(sorted(named)):
        ladder = " of Llama 3 8B" if number == 0 else ""
        word = WORDS[place][:1].upper() + WORDS[place][1:]
        yield f"{word}, as {LIKE[place]}{ladder}: {', '.join(named[place])}"


def evaluation_document(
    job: EvaluationJob,
    results: Sequence[EvaluationDone],
    verdicts: Sequence[Verdict],
    speeds: Sequence[SpeedDone] = (),
    solved: Sequence[TaskDone] = (),
) -> dict[str, Any]:
    """Everything with all digits, for ``--json``; "speeds" only where they were measured."""
    reference = job.reference
    floors = [_result(found) for found in results if found.is_floor]
    return {
        "context": job.length,
        "stride": job.stride,
        "reference": reference.label if reference else None,
        "reference_engine": reference.engine if reference else None,
        "base": str(job.base.path) if job.base else None,
        "results": [_result(found) for found in results if not found.is_floor],
        "gates": [
            {
                "gate": verdict.name,
                "limit": verdict.limit,
                "value": verdict.value,
                "passed": verdict.passed,
                "artifact": verdict.artifact,
                "text": verdict.text,
            }
            for verdict in verdicts
        ],
        **({"floors": floors} if floors else {}),
        **({"speeds": [_speed(done) for done in speeds]} if speeds else {}),
        **({"tasks": [_task(done) for done in solved]} if solved else {}),
    }


def _task(done: TaskDone) -> dict[str, Any]:
    return {
        "artifact": done.artifact.label,
        "task": done.task,
        "metric": done.metric,
        "value": done.value,
        "error": done.error,
    }


def _speed(done: SpeedDone) -> dict[str, Any]:
    speed = done.speed
    return {
        "artifact": done.artifact.label,
        "bytes": done.artifact.nbytes,
        "bits_per_weight": done.artifact.bits_per_weight,
        "memory_bytes": speed.memory,
        "threads": speed.threads,
        "repacked": speed.repacked,
        "prompt_tokens": PROMPT,
        "generation_tokens": GENERATION,
        "prompt_tokens_per_second": speed.prompt_speed,
        "generation_tokens_per_second": speed.generation_speed,
        "runs": [
            {
                "prompt": prompt,
                "generation": generation,
                "llama_cpp_prompt": own_prompt,
                "llama_cpp_generation": own_generation,
            }
            for prompt, generation, own_prompt, own_generation in zip(
                speed.prompt,
                speed.generation,
                speed.own_prompt,
                speed.own_generation,
                strict=True,
            )
        ],
    }


def _result(found: EvaluationDone) -> dict[str, Any]:
    artifact, summary = found.artifact, found.summary
    fields: dict[str, Any] = {
        "artifact": artifact.label,
        "engine": artifact.engine,
        "bytes": artifact.nbytes,
        "bits_per_weight": artifact.bits_per_weight,
        "text": found.text,
        "windows": found.windows,
        "positions": summary.positions,
        "perplexity": _estimate(summary.perplexity),
    }
    if found.greedy is not None:
        fields["greedy"] = {
            "prompts": found.greedy.prompts,
            "tokens": found.greedy.tokens,
            "agreement": _estimate(found.greedy.agreement),
            "alike": _estimate(found.greedy.alike),
            "whole": _estimate(found.greedy.whole),
        }
    return fields | (_against(summary.against) if summary.against else {})


def _against(found: Divergence) -> dict[str, Any]:
    judged = judge_divergence(found)
    return {
        "base_perplexity": _estimate(found.base_perplexity),
        "correlation": found.correlation,
        "log_ratio": _estimate(found.log_ratio),
        "ratio": _estimate(found.ratio),
        "difference": _estimate(found.difference),
        "kld": {
            **_estimate(found.mean),
            "exact": found.ceiling is None,
            "at_most": found.mean.value if found.ceiling is None else found.ceiling,
            "quantiles": {f"{q:g}": value for q, value in found.quantiles.items()},
        },
        "same_top": _estimate(found.same_top),
        "by_confidence": [
            {
                "from": band.low,
                "to": band.high,
                "positions": band.positions,
                "share": band.share,
                "kld": _estimate(band.mean) if band.mean else None,
                "same_top": _estimate(band.same_top) if band.same_top else None,
            }
            for band in found.by_confidence
        ],
        "verdict": {
            "overall": WORDS[judged.overall],
            "kld": WORDS[judged.divergence],
            "perplexity": WORDS[judged.perplexity],
            "same_top": WORDS[judged.agreement],
        },
        "delta_p": {
            "mean": _estimate(found.p_mean),
            "rms": _estimate(found.p_rms),
            "quantiles": {f"{q:g}": value for q, value in found.p_quantiles.items()},
        },
    }


def _estimate(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "error": estimate.error}
