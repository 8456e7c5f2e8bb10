"""How an embedding model makes one vector of a text's: ``{arch}.pooling_type``.

sentence-transformers lists a model's stages in modules.json; the folder of the stage "Pooling" says
how. llama.cpp has the mean, the first and the last token, and what comes after, such as a Dense
stage, not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantcli.errors import SourceError
from quantcli.sources.files import read_json, read_json_value
from quantcli.types import MetaValue, u32

_TYPES = {"mean_tokens": 1, "cls_token": 2, "lasttoken": 3}
"""LLAMA_POOLING_TYPE_*, by the ends of the settings' names."""
_MODES = {"mean": 1, "cls": 2, "lasttoken": 3}
_HARMLESS = ("Transformer", "Pooling", "Normalize")


def pooling_metadata(
    folder: Path,
    arch: str,
    known: Mapping[str, MetaValue],
    on_note: Callable[[str], None],
) -> dict[str, MetaValue]:
    """The key-value of the checkpoint in ``folder``, empty where nothing is pooled.

    ``known`` are the model's key-values. ``on_note`` takes a sentence on each stage that llama.cpp
    does not have, and on an encoder for which nothing says how its vectors become one.
    """
    path = folder / "modules.json"
    if not path.is_file():
        causal = known.get(f"{arch}.attention.causal")
        if causal is not None and not causal.value and f"{arch}.pooling_type" not in known:
            on_note(
                f"{folder} has no modules.json, so the file does not say how the tokens' vectors "
                f"become one; --override-kv {arch}.pooling_type=int:1 takes their mean, 2 the "
                "first token's, 3 the last one's"
            )
        return {}
    stages = read_json_value(path)
    if not isinstance(stages, list):
        raise SourceError(f"{path}: holds a JSON {type(stages).__name__} where a list belongs")
    keys: dict[str, MetaValue] = {}
    for stage in stages:
        if not isinstance(stage, dict):
            raise SourceError(f"{path}: {stage!r} is not a stage with a type and a path")
        kind = str(stage.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            found = _pooling(folder, str(stage.get("path", "")), on_note)
            keys |= {} if found is None else {f"{arch}.pooling_type": u32(found)}
        elif kind not in _HARMLESS:
            on_note(
                f"{path} has the stage {kind}, which llama.cpp does not have, so its embeddings "
                "are those before that stage"
            )
    return keys


def _pooling(folder: Path, stage: str, on_note: Callable[[str], None]) -> int | None:
    path = folder / stage / "config.json"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise SourceError(f"{folder / 'modules.json'}: the path {stage!r} leaves the folder")
    settings: dict[str, Any] = read_json(path)
    chosen = [
        name.removeprefix("pooling_mode_")
        for name, on in settings.items()
        if name.startswith("pooling_mode_") and on is True
    ] or [str(settings.get("pooling_mode"))]
    found = _TYPES.get(chosen[0], _MODES.get(chosen[0]))
    if len(chosen) > 1 or found is None:
        on_note(
            f"{path} pools by {' and '.join(chosen)}, which llama.cpp does not have, so it gives "
            "one vector for each token; it has mean, cls and last"
        )
        return None
    return found
