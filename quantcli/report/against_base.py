"""What sets models apart from their base, in tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from quantcli.evals.bands import WORDS, judge_divergence
from quantcli.evals.run import EvaluationDone
from quantcli.evals.summary import Divergence, Estimate
from quantcli.report.tables import Column, Table, facts
from quantcli.report.units import number_text, percent_text


def details(found: Divergence) -> Table:
    """Every figure of one model on one text."""
    shown = [("max", 1.0), ("99.9 %", 0.999), ("99 %", 0.99), ("95 %", 0.95), ("90 %", 0.9)]
    shown += [("median", 0.5), ("10 %", 0.1), ("min", 0.0)]
    judged = judge_divergence(found)
    return facts(
        [
            ("perplexity", f"{WORDS[judged.perplexity]} ({100 * (found.ratio.value - 1):+.2f} %)"),
            ("KL divergence", WORDS[judged.divergence]),
            ("top tokens", WORDS[judged.agreement]),
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


def by_confidence(found: Divergence) -> Table:
    """Where the divergence is: where the base was sure of the next token, or where it was not."""
    columns = (
        Column("base's top token"),
        Column("positions", "right"),
        Column("KLD mean", "right"),
        Column("±", "right", drop=2),
        Column("same top", "right"),
        Column("±", "right", drop=1),
    )
    rows = []
    for band in found.by_confidence:
        name = f"{100 * band.low:.0f} to {100 * band.high:.0f} %"
        cells: tuple[str, ...] = ("", "", "", "")
        if band.mean is not None and band.same_top is not None:
            same = (percent_text(value) for value in (band.same_top.value, band.same_top.error))
            cells = (*pair(band.mean, 5), *same)
        rows.append((name, percent_text(band.share), *cells))
    return Table(columns, tuple(rows), title="By the probability of the base's top token")


def by_text(results: Sequence[EvaluationDone]) -> Table:
    """Each text's ratio of perplexities, for each model: what costs more on code than on prose."""
    columns = (
        Column("text"),
        Column("model"),
        Column("perplexity ratio", "right"),
        Column("±", "right", drop=2),
        Column("KLD mean", "right"),
        Column("same top", "right", drop=1),
    )
    rows = []
    for found in results:
        against = found.summary.against
        if against is not None:
            top = percent_text(against.same_top.value)
            figures = (*pair(against.ratio, 4), f"{against.mean.value:.5f}", top)
            rows.append((found.text, found.artifact.label, *figures))
    return Table(columns, tuple(rows), title="Against the base, text by text")


def pair(estimate: Estimate, digits: int) -> tuple[str, str]:
    """A value and its error as two cells."""
    return f"{estimate.value:.{digits}f}", f"{estimate.error:.{digits}f}"


def _pm(estimate: Estimate, digits: int = 4) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.3f} ± {100 * estimate.error:.3f} %"
