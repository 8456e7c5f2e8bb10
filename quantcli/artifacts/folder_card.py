"""The model card of a folder: what it was made of and how, and how it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from quantcli.layouts import find_layout

CARD = "README.md"
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Of the source's front matter."""


def write_card(
    source: Path,
    *,
    name: str,
    repo: str | None,
    to: str,
    weights: str,
    recipe: str,
    nbytes: int,
    bits: float,
    version: str,
) -> bytes:
    """The card of a folder made of the checkpoint in ``source``, whose license it keeps."""
    layout = find_layout(to)
    front = {key: value for key, value in _front_matter(source).items() if key in _KEPT}
    if repo is not None:
        front["base_model"] = repo
    front["library_name"] = layout.library
    front["tags"] = ["quantcli", to]
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"""---
{head}---
# {name.rpartition("/")[2]}, {weights}

Made from {name} with quantcli {version} for {to}: {nbytes / 1e6:,.1f} MB of weights,
{bits:.2f} bits per weight.

The recipe, of which quantcli makes the same bytes again:

```toml
{recipe.rstrip()}
```

To run it:

```
{layout.usage("FOLDER")}
```
""".encode()


def _front_matter(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    if not text.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(text[4:].partition("\n---")[0])
        json.dumps(found)
    except (yaml.YAMLError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
