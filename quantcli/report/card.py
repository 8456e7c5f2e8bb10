"""A model card for an artifact: what it was made from, how, what it weighs, what it costs.

Text alone: a caller gives the facts as it wants them read. The front matter has the keys that the
Hub shows (base model, license, library, tags); the table of an evaluation is `eval-ppl --json`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quantcli.errors import SourceError
from quantcli.sources.files import read_json

EVALUATION = "quantcli.eval-ppl/1"
_LINK = "https://huggingface.co/"


@dataclass(frozen=True)
class Card:
    """What a card says. ``facts`` are labels and values; ``usage`` is a shell or Python snippet.

    ``base_model`` is a repository (org/name) or a plain name; ``recipe`` a recipe file's text.
    """

    name: str
    library: str
    base_model: str | None = None
    license: str | None = None
    languages: Sequence[str] = ()
    tags: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    recipe: str | None = None
    usage: str | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)


def render_card(card: Card) -> str:
    """The card as Markdown with its front matter."""
    front: dict[str, Any] = {"library_name": card.library, "tags": [*card.tags, "quantcli"]}
    if card.base_model and "/" in card.base_model:
        front |= {"base_model": card.base_model, "base_model_relation": "quantized"}
    if card.license:
        front["license"] = card.license
    if card.languages:
        front["language"] = list(card.languages)
    head = yaml.safe_dump(front, sort_keys=True, allow_unicode=True)
    parts = [f"---\n{head}---", f"# {card.name}"]
    if card.base_model:
        base = card.base_model
        shown = f"[{base}]({_LINK}{base})" if "/" in base else base
        parts.append(f"Made from {shown} with quantcli.")
    if card.facts:
        parts.append(_table(("", ""), [[label, value] for label, value in card.facts]))
    if card.evaluation:
        parts += ["## Measured", _evaluation(card.evaluation)]
    if card.usage:
        parts += ["## Use", f"```\n{card.usage}\n```"]
    if card.recipe:
        parts += ["## Recipe", f"```toml\n{card.recipe.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def read_evaluation(path: Path) -> dict[str, Any]:
    """The JSON that ``quantcli eval-ppl --json`` printed; SourceError when it is something else."""
    found = read_json(path)
    if found.get("schema") != EVALUATION or not isinstance(found.get("results"), list):
        raise SourceError(
            f"{path}: is not an evaluation",
            hint="quantcli eval-ppl ... --json > eval.json makes one",
        )
    try:
        _evaluation(found)
    except (KeyError, TypeError, ValueError) as broken:
        raise SourceError(f"{path}: the evaluation is damaged: {broken!r}") from broken
    return found


def _evaluation(found: Mapping[str, Any]) -> str:
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
    return f"{text}.\n\n{_table(header, rows)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
