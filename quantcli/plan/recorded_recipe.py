"""The recipe that an output holds, so that another can be made like it: `--recipe m.gguf`.

A GGUF has it as a key-value, a model folder in its manifest. Types and schemes that were chosen by
their costs stand there by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantcli.errors import UsageError
from quantcli.sources.gguf_header import is_gguf, read_gguf
from quantcli.whole_files import read_whole_text

KEY = "quantcli.recipe"
_MANIFEST = "quantcli.json"
_MOST = 1 << 26
"""Characters of a manifest; a model of a million modules has fewer."""


def recorded_recipe(path: Path) -> str | None:
    """The recipe, as TOML, in a GGUF, a model folder or its manifest; None for any other file.

    UsageError for an output that records none.
    """
    manifest = path / _MANIFEST if path.is_dir() else path
    found: Any = None
    if manifest.name == _MANIFEST:
        if path.is_dir() and not manifest.exists():
            raise UsageError(
                f"recipe {path}: the folder records no recipe", hint="quantcli did not make it"
            )
        try:
            found = json.loads(read_whole_text(manifest, _MOST))
        except (OSError, ValueError) as error:
            raise UsageError(f"recipe {manifest}: {error}") from None
        found = found.get("recipe") if isinstance(found, dict) else None
    elif path.is_file() and is_gguf(path):
        key = read_gguf(path).metadata.get(KEY)
        found = None if key is None else key.value
    else:
        return None
    if not isinstance(found, str):
        raise UsageError(f"recipe {path}: it records no recipe", hint="quantcli did not make it")
    return found
