"""The report's pictures, as SVG that takes the page's colour: matplotlib draws them."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from quantcli.errors import MissingExtraError
from quantcli.exports.report.facts import ArtifactFacts
from quantcli.exports.report.sensitivity import Sensitivity

_INK = "#010203"
"""Stands for the page's own text colour, and is drawn with nothing else."""
_COLOURS = ("#2a7ab8", "#d1603d", "#3f9142", "#8a5bb0", "#b08a1e", "#4aa3a2")


def require_matplotlib() -> None:
    """MissingExtraError where it is not installed."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError("a report's plots need matplotlib", hint="pip install matplotlib")


def divergence_plot(text: str, artifacts: Sequence[ArtifactFacts]) -> str | None:
    """Mean KL divergence against size, one point each; None where nothing was compared."""
    points = [
        (each.nbytes / 1e6, each.measured[text]["kld"]["value"], each.name)
        for each in artifacts
        if "kld" in each.measured[text]
    ]
    if not points:
        return None
    return _scatter(
        points, ("size in MB", "mean KL divergence, nats per token"), f"divergence {text}"
    )


def speed_plot(artifacts: Sequence[ArtifactFacts]) -> str | None:
    """Generation speed against size; None where none was measured."""
    points = [
        (each.nbytes / 1e6, each.speed["generation_tokens_per_second"], each.name)
        for each in artifacts
        if each.speed
    ]
    return _scatter(points, ("size in MB", "tokens per second"), "speed") if points else None


def layer_plot(artifacts: Sequence[ArtifactFacts]) -> str | None:
    """Each block's relative error, a line for each artifact; None without errors."""
    lines = [(_short(each.name), found) for each in artifacts if (found := each.layer_errors())]
    return _by_block(lines, "relative error of the weights", "layers") if lines else None


def sensitivity_plot(kinds: Sequence[Sensitivity]) -> str:
    """What each block would cost, a line for each kind."""
    lines = [(each.kind, each.blocks) for each in kinds]
    return _by_block(lines, "KL divergence, nats per token", "sensitivity")


def _by_block(
    lines: Sequence[tuple[str, Sequence[tuple[int, float]]]], label: str, salt: str
) -> str:
    figure, axis = _figure(salt)
    for (name, found), colour in zip(lines, _COLOURS * len(lines), strict=False):
        numbers, values = zip(*found, strict=True)
        axis.plot(numbers, values, marker="o", markersize=4, color=colour, label=name)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("block")
    axis.set_ylabel(label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def _scatter(points: Sequence[tuple[float, float, str]], labels: tuple[str, str], salt: str) -> str:
    figure, axis = _figure(salt)
    values = [value for _, value, _ in points]
    if min(values) > 0 and max(values) > 3 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    for number, (size, value, name) in enumerate(sorted(points)):
        axis.plot([size], [value], "o", color=_COLOURS[0], markersize=6)
        # Above and below in turn, so that neighbours' names do not lie on one another.
        above = number % 2 == 0
        axis.annotate(
            _short(name), (size, value), xytext=(0, 8 if above else -14),
            textcoords="offset points", ha="center", fontsize=8,
        )  # fmt: skip
    axis.margins(0.14, 0.16)
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    return _svg(figure)


def _figure(salt: str) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams |= {  # of this process; nothing else draws in it
        "svg.hashsalt": salt, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color",
             "grid.color"),
            _INK,
        ),
    }  # fmt: skip
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    into = io.StringIO()
    figure.savefig(into, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = into.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(_INK, "currentColor")
    # The page gives the width.
    return re.sub(r'(<svg [^>]*?)width="[^"]*" ', r"\1", drawn, count=1).replace(
        ' height="273.6pt"', "", 1
    )


def _short(name: str) -> str:
    """What sets a file's name apart: its last part."""
    stem = name.removesuffix(".gguf")
    return stem.rpartition("-")[2] if "-" in stem else stem
