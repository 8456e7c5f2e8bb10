"""Model cards: front matter that the Hub reads, and Markdown for people.

Whoever makes an artifact gives the facts; every card is rendered here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from quantcli import __version__
from quantcli.bounded_yaml import load_yaml
from quantcli.layouts import find_layout
from quantcli.sources.card import CARD
from quantcli.whole_files import read_whole_text

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Of the source's front matter."""
_FENCE = "```"


@dataclass(frozen=True)
class Card:
    """What a card says: its front matter in order, and its paragraphs, the title first."""

    front: Mapping[str, Any]
    paragraphs: Sequence[str]


def render_card(card: Card) -> bytes:
    """The card as Markdown with its front matter."""
    head = yaml.safe_dump(dict(card.front), sort_keys=False, allow_unicode=True)
    whole = f"---\n{head}---\n" + "\n\n".join(map(_inert, card.paragraphs)) + "\n"
    # The bytes of a name that is not UTF-8 have no place in Markdown.
    return whole.encode("utf-8", "replace")


def _inert(paragraph: str) -> str:
    """A paragraph in which names out of a model make no HTML, and no link but to http."""
    if paragraph.startswith(_FENCE):
        return paragraph
    paragraph = paragraph.replace("<", "&lt;")
    paragraph = re.sub(r"\]\((?!https?://)", r"]\\(", paragraph)
    return re.sub(r"^( *)\[(?=[^\n]*\]:)", r"\1\\[", paragraph, flags=re.MULTILINE)


def fence(text: str, language: str = "") -> str:
    """A block of code, between marks that are longer than any in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    mark = "`" * max(len(_FENCE), longest + 1)
    return f"{mark}{language}\n{text}\n{mark}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def describe_folder(
    source: Path,
    *,
    name: str,
    repo: str | None,
    to: str,
    weights: str,
    recipe: str,
    nbytes: int,
    bits: float,
) -> Card:
    """The card of a folder made of the checkpoint in ``source``, whose license it keeps."""
    layout = find_layout(to)
    front = {key: value for key, value in _front_matter(source).items() if key in _KEPT}
    if urlsplit(str(front.get("license_link", ""))).scheme not in ("", "http", "https"):
        del front["license_link"]
    if repo is not None:
        front["base_model"] = repo
    front |= {"library_name": layout.library, "tags": ["quantcli", to]}
    paragraphs = [
        f"# {name.rpartition('/')[2]}, {weights}",
        f"Made from {name} with quantcli {__version__} for {to}: {nbytes / 1e6:,.1f} MB of "
        f"weights,\n{bits:.2f} bits per weight.",
        "The recipe, of which quantcli makes the same bytes again:",
        fence(recipe.rstrip(), "toml"),
        "To run it:",
        fence(layout.usage("FOLDER")),
    ]
    return Card(front, paragraphs)


def _front_matter(folder: Path) -> dict[str, Any]:
    try:
        text = read_whole_text(folder / CARD)
    except (OSError, UnicodeDecodeError):
        return {}
    if not text.startswith("---\n"):
        return {}
    try:
        found = load_yaml(text[4:].partition("\n---")[0])
        json.dumps(found)
    except (TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
