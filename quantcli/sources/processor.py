"""The settings of a processor beside a checkpoint, which normalise what its towers see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantcli.sources.files import read_json

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""The later wins; it nests the settings of its parts."""
_PARTS = ("media_proc_cfg", "image_processor", "feature_extractor")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tekken.json")


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
        for number, text in _added_tokens(read_json(path)):
            if text == content and str(number).isdigit():
                return int(str(number))
    return None


def _added_tokens(settings: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Ids and texts, from whichever of the three files it is."""
    for key, number, text in (("added_tokens", "id", "content"),
                              ("special_tokens", "rank", "token_str")):  # fmt: skip
        entries = settings.get(key)
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict):
                yield entry.get(number), entry.get(text)
    by_id = settings.get("added_tokens_decoder")
    for name, entry in by_id.items() if isinstance(by_id, dict) else ():
        if isinstance(entry, dict):
            yield name, entry.get("content")
