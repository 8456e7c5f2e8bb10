"""The small files of a checkpoint folder out of a GGUF's key-values.

config.json and the tokenizer files are rebuilt elsewhere; here they get their token ids, and
generation_config.json comes from the ends of generation and the recommended sampling parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcli.types import MetaValue

_TOKENS = "tokenizer.ggml."
_SAMPLING = "general.sampling."
_SETTINGS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""GGUF's sampling parameters that transformers has, by its name for each."""
_OF_WEIGHTS = ("dtype", "torch_dtype", "quantization_config", "quantization")
"""Keys of a configuration that say how its own weights were stored."""
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def token_texts(metadata: Mapping[str, MetaValue]) -> list[Any]:
    """The texts of all tokens by id; empty where the file has none."""
    found = metadata.get(f"{_TOKENS}tokens")
    return list(found.value) if found is not None and found.kind == "[str]" else []


def special_ids(metadata: Mapping[str, MetaValue]) -> dict[str, int | None]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of a configuration."""
    return {
        f"{role}_token_id": _number(metadata, f"{_TOKENS}{key}_token_id")
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }


def ending_ids(metadata: Mapping[str, MetaValue]) -> list[int]:
    """Tokens that end generation: end of text, of a turn, of a message, each once."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [_number(metadata, _TOKENS + key) for key in keys]
    return list(dict.fromkeys(number for number in found if number is not None))


def sampling(metadata: Mapping[str, MetaValue]) -> dict[str, Any]:
    """Recommended sampling parameters by transformers' names, as short decimals."""
    found = {}
    for key, name in _SETTINGS.items():
        value = metadata.get(_SAMPLING + key)
        if value is not None and isinstance(value.value, int | float):
            number = value.value
            found[name] = float(f"{number:.7g}") if isinstance(number, float) else number
    return found


def complete_config(
    config: Mapping[str, Any],
    metadata: Mapping[str, MetaValue],
    dtype: str,
    given: Path | None = None,
) -> dict[str, Any]:
    """``config`` with the token ids and the dtype ("F32" ...) that weights are loaded in.

    One that was ``given`` as a file keeps its token ids.
    """
    kept = {key: value for key, value in config.items() if key not in _OF_WEIGHTS}
    ids = {} if given is not None else special_ids(metadata)
    return {**kept, **ids, "dtype": _DTYPES[dtype]}


def generation_config(metadata: Mapping[str, MetaValue]) -> dict[str, Any]:
    """generation_config.json."""
    ids = {key: number for key, number in special_ids(metadata).items() if number is not None}
    endings = ending_ids(metadata)
    if len(endings) > 1:
        ids["eos_token_id"] = endings  # type: ignore[assignment]
    chosen = sampling(metadata)
    return {**ids, **({"do_sample": True, **chosen} if chosen else {})}


def _number(metadata: Mapping[str, MetaValue], key: str) -> int | None:
    found = metadata.get(key)
    return int(found.value) if found is not None and isinstance(found.value, int) else None
