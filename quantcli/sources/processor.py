"""The settings of a processor beside a checkpoint, which normalise what its towers see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantcli.sources.files import read_json

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""The later wins; it nests the settings of its parts."""
_PARTS = ("media_proc_cfg", "image_processor", "feature_extractor")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")


def read_processor(folder: Path) -> dict[str, Any]:
    """All settings of the processor in ``folder``; empty without one.

    SourceError when a file of it is broken.
    """
    found: dict[str, Any] = {}
    for path in (folder / name for name in _PROCESSORS):
        if path.exists():
            settings = read_json(path)
            found |= settings
            for part in _PARTS:
                inner = settings.get(part)
                found |= inner if isinstance(inner, dict) else {}
    return found


def find_added_token(folder: Path, content: str) -> int | None:
    """The id of an added token of the tokenizer in ``folder``, None where no file names it."""
    for path in (folder / name for name in _TOKENIZERS):
        if not path.exists():
            continue
        settings = read_json(path)
        by_id = settings.get("added_tokens_decoder") or {}
        listed = [{"id": number, **entry} for number, entry in by_id.items()]
        for entry in [*(settings.get("added_tokens") or []), *listed]:
            if entry.get("content") == content:
                return int(entry["id"])
    return None
