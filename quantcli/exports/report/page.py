"""The page: one HTML file without scripts, that loads nothing and follows light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from quantcli import __version__
from quantcli.exports.report.facts import ArtifactFacts, ReportFacts, texts_of
from quantcli.exports.report.plots import (
    divergence_plot,
    layer_plot,
    sensitivity_plot,
    speed_plot,
)
from quantcli.report.units import count_text, percent_text, size_text

_TEMPLATE = Path(__file__).with_name("page.html")


def render_page(facts: ReportFacts) -> bytes:
    """The page as UTF-8. Whatever an artifact holds is shown as text, never as markup."""
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    largest = max(
        (tensor.error or 0.0 for each in facts.artifacts for tensor in each.tensors), default=0.0
    )
    environment.filters |= {
        "size": size_text,
        "nats": lambda cost: "" if cost is None else f"{cost:.2g}",
        "share": lambda error: "" if error is None else percent_text(error),
        "shade": lambda error: f"{0.6 * (error or 0.0) / (largest or 1.0):.3f}",
    }
    columns, rows = measured_table(facts)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        version=__version__,
        parameters=count_text(facts.parameters),
        columns=columns,
        rows=rows,
        # matplotlib escapes what it writes.
        plots=[(title, caption, Markup(svg)) for title, caption, svg in _plots(facts)],
        has_errors=largest > 0,
        has_costs=any(each.sensitivity for each in facts.artifacts),
    )
    return page.encode("utf-8", "replace")


def measured_table(facts: ReportFacts) -> tuple[list[str], list[list[str]]]:
    """Headings beyond file, size and bits per weight, and a row for each artifact."""
    columns: list[str] = []
    several = len(facts.texts) > 1
    for text, _ in texts_of(facts):
        suffix = f" ({Path(text).stem})" if several else ""
        columns += [f"perplexity{suffix}"]
        if any("kld" in each.measured.get(text, {}) for each in facts.artifacts):
            columns += [f"KLD mean{suffix}", f"KLD 99 %{suffix}", f"same top token{suffix}"]
    if any(each.speed for each in facts.artifacts):
        columns += ["prompt tokens/s", "generated tokens/s", "memory"]
    return columns, [_row(facts, each) for each in facts.artifacts]


def _row(facts: ReportFacts, each: ArtifactFacts) -> list[str]:
    cells = [each.name, size_text(each.nbytes), f"{each.bits:.2f}"]
    for text, _ in texts_of(facts):
        found = each.measured.get(text, {})
        value = found.get("perplexity", {}).get("value")
        cells.append("" if value is None else f"{value:.4f}")
        if any("kld" in other.measured.get(text, {}) for other in facts.artifacts):
            if "kld" in found:
                quantile = found["kld"]["quantiles"].get("0.99")
                cells += [
                    f"{found['kld']['value']:.5f}",
                    "" if quantile is None else f"{quantile:.4f}",
                    percent_text(found["same_top"]["value"]),
                ]
            else:
                cells += [""] * 3
    if any(other.speed for other in facts.artifacts):
        speed = each.speed
        cells += [""] * 3 if speed is None else [
            f"{speed['prompt_tokens_per_second']:,.0f}",
            f"{speed['generation_tokens_per_second']:,.1f}",
            size_text(speed["memory_bytes"]),
        ]  # fmt: skip
    return cells


def _plots(facts: ReportFacts) -> Iterator[tuple[str, str, str]]:
    for text, artifacts in texts_of(facts):
        drawn = divergence_plot(text, artifacts)
        if drawn:
            caption = f"On {Path(text).name}. Lower and further left is better."
            yield "Divergence against size", caption, drawn
    drawn = speed_plot(facts.artifacts)
    if drawn:
        yield "Speed against size", "Generation in llama.cpp. Higher is better.", drawn
    drawn = layer_plot(facts.artifacts)
    if drawn:
        caption = (
            "Root mean square of the difference from the original's weights, relative to theirs, "
            "over the matrices of a block."
        )
        yield "Error by layer", caption, drawn
    drawn_before = set()
    for each in facts.artifacts:
        if each.sensitivity and each.sensitivity not in drawn_before:
            drawn_before.add(each.sensitivity)
            caption = (
                f"What each block would add to the divergence if all its matrices had one type, as "
                f"it was measured to choose the types of {each.name}. A flat line leaves nothing "
                "to choose."
            )
            yield "Sensitivity by layer", caption, sensitivity_plot(each.sensitivity)
