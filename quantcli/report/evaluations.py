"""What an evaluation found: a comparison table for people, every figure for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantcli.evals.gates import Verdict
from quantcli.evals.run import EvaluationDone, EvaluationJob
from quantcli.evals.summary import Divergence, Estimate
from quantcli.report.tables import Column, Table, facts
from quantcli.report.units import number_text, percent_text, size_text

_LOWER_BOUND = (
    "The compact base leaves out part of the divergence: its figures are lower bounds, and all "
    "others are exact."
)


def evaluation_tables(job: EvaluationJob, results: Sequence[EvaluationDone]) -> list[Table]:
    """A comparison for each text, and the details where a single model was held against a base."""
    tables = []
    for text in dict.fromkeys(found.text for found in results):
        rows = [found for found in results if found.text == text]
        tables.append(_comparison(job, text, rows))
        if len(rows) == 1 and rows[0].summary.against is not None:
            tables.append(_details(rows[0].summary.against))
    return tables


def _comparison(job: EvaluationJob, text: str, results: Sequence[EvaluationDone]) -> Table:
    columns = [
        Column("model"),
        Column("size", "right"),
        Column("bits/weight", "right"),
        Column("perplexity", "right"),
    ]
    if job.compares:
        columns += [Column(h, "right") for h in ("KLD mean", "KLD 99 %", "same top token")]
    rows: list[tuple[str, ...]] = []
    if job.compares:
        base = results[0].summary.against
        where = job.reference
        label = where.label if where else str(job.base.path) if job.base else ""
        size = (size_text(where.nbytes), f"{where.bits_per_weight:.2f}") if where else ("", "")
        if base is not None:
            rows.append((f"{label} (base)", *size, _pm(base.base_perplexity), "", "", ""))
    for found in results:
        artifact, against = found.artifact, found.summary.against
        row: tuple[str, ...] = (
            artifact.label,
            size_text(artifact.nbytes),
            f"{artifact.bits_per_weight:.2f}",
            _pm(found.summary.perplexity),
        )
        if against is not None:
            row += (
                _pm(against.mean, 5),
                f"{against.quantiles[0.99]:.5f}",
                percent_text(against.same_top.value),
            )
        rows.append(row)
    some = results[0]
    way = f"stride {job.stride}" if job.stride else "second half of each window"
    engines = ", ".join(dict.fromkeys(found.artifact.engine for found in results))
    title = (
        f"{text}: {some.windows} windows of {job.length} tokens, {some.summary.positions} scored "
        f"({way}), {engines}"
    )
    partly = some.summary.against is not None and some.summary.against.ceiling is not None
    return Table(tuple(columns), tuple(rows), title=title, note=_LOWER_BOUND if partly else None)


def _details(found: Divergence) -> Table:
    shown = [("max", 1.0), ("99.9 %", 0.999), ("99 %", 0.99), ("95 %", 0.95), ("90 %", 0.9)]
    shown += [("median", 0.5), ("10 %", 0.1), ("min", 0.0)]
    return facts(
        [
            ("perplexity ratio", _pm(found.ratio, 6)),
            ("perplexity difference", _pm(found.difference, 6)),
            ("ln of the ratio", _pm(found.log_ratio, 6)),
            ("correlation of losses", percent_text(found.correlation)),
            ("KLD mean", _pm(found.mean, 6)),
            *((f"KLD {name}", number_text(found.quantiles[q])) for name, q in shown),
            ("same top token", _percent(found.same_top)),
            ("Δp mean", _percent(found.p_mean)),
            ("Δp root mean square", _percent(found.p_rms)),
        ]
    )


def _pm(estimate: Estimate, digits: int = 4) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.3f} ± {100 * estimate.error:.3f} %"


def evaluation_document(
    job: EvaluationJob, results: Sequence[EvaluationDone], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """Everything with all digits, for ``--json``."""
    reference = job.reference
    return {
        "context": job.length,
        "stride": job.stride,
        "reference": reference.label if reference else None,
        "reference_engine": reference.engine if reference else None,
        "base": str(job.base.path) if job.base else None,
        "results": [_result(found) for found in results],
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
    return fields | (_against(summary.against) if summary.against else {})


def _against(found: Divergence) -> dict[str, Any]:
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
        "delta_p": {
            "mean": _estimate(found.p_mean),
            "rms": _estimate(found.p_rms),
            "quantiles": {f"{q:g}": value for q, value in found.p_quantiles.items()},
        },
    }


def _estimate(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "error": estimate.error}
