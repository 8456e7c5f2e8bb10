"""What ``quantcli eval-ppl --json`` measured, for a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcli.artifacts.model_card import format_table
from quantcli.errors import SourceError
from quantcli.sources.files import read_json

EVALUATION = "quantcli.eval-ppl/1"


def read_evaluation(path: Path) -> dict[str, Any]:
    """The JSON that ``quantcli eval-ppl --json`` printed; SourceError when it is something else."""
    found = read_json(path)
    if found.get("schema") != EVALUATION or not isinstance(found.get("results"), list):
        raise SourceError(
            f"{path}: is not an evaluation",
            hint="quantcli eval-ppl ... --json > eval.json makes one",
        )
    if not found["results"]:
        raise SourceError(
            f"{path}: holds no evaluation on a text",
            hint="quantcli eval-ppl MODEL --data TEXT --json > eval.json makes one",
        )
    try:
        describe_evaluation(found)
    except (KeyError, TypeError, ValueError) as broken:
        raise SourceError(f"{path}: the evaluation is damaged: {broken!r}") from broken
    return found


def describe_evaluation(found: Mapping[str, Any]) -> str:
    """A paragraph and a table for a model card."""
    results = found["results"]
    compared = any("kld" in result for result in results)
    header = ["model", "bits per weight", "perplexity"]
    header += ["KL divergence", "same top token"] if compared else []
    rows = []
    for result in results:
        row = [
            Path(result["artifact"]).name,
            f"{result['bits_per_weight']:.2f}",
            f"{result['perplexity']['value']:.4f} ± {result['perplexity']['error']:.4f}",
        ]
        if compared and "kld" in result:
            same = result["same_top"]
            row += [
                f"{result['kld']['value']:.5f} ± {result['kld']['error']:.5f}",
                f"{100 * same['value']:.1f} %",
            ]
        rows.append(row + [""] * (len(header) - len(row)))
    first = results[0]
    text = f"{first['text']}, {first['windows']} windows of {found['context']} tokens"
    base = found.get("reference")
    if base and compared:
        text += f", against {Path(base).name}"
    return f"{text}.\n\n{format_table(header, rows)}"
