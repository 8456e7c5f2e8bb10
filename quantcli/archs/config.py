"""Reading config.json: each value checked where it is read, each refusal one sentence.

transformers writes only part of a configuration and renamed some keys over the years, so a
family gives its class's defaults, and readers take several spellings of a key. A null counts as
absent, as it does there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quantcli.errors import ArchitectureError

Config = Mapping[str, Any]

_LARGEST = 2**31 - 1
"""llama.cpp keeps sizes in 32-bit integers."""


def class_name(config: Config) -> str:
    """The first of ``architectures``, by which transformers chooses the model class."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not names[0] or not isinstance(names[0], str):
        raise ArchitectureError(
            "config.json names no architecture",
            hint='it needs a line such as "architectures": ["LlamaForCausalLM"]',
        )
    return names[0]


def text_part(config: Config) -> Mapping[str, Any]:
    """The text model's part of a wrapper's config.json; empty where it holds none.

    ``text_config`` in transformers, ``llm_config`` in InternVL's own code; the omni models of Qwen
    have it in ``thinker_config``.
    """
    if isinstance(config.get("thinker_config"), Mapping):
        config = config["thinker_config"]
    key = next((key for key in ("text_config", "llm_config") if config.get(key)), None)
    if key is None:
        return {}
    if not isinstance(config[key], Mapping):
        raise ArchitectureError(f"{key} in config.json is not an object")
    return dict(config[key])


def settle(config: Config, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's configuration: ``defaults`` lie below it, ``text_config`` above."""
    inner = text_part(config)
    settled = {**defaults, **config, **inner, "architectures": [class_name(config)]}
    if config.get("tie_word_embeddings") is not None:
        # Of a wrapper the outer one counts, since the head is the wrapper's.
        settled["tie_word_embeddings"] = config["tie_word_embeddings"]
    return settled


def check_fixed(config: Config, fixed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a value that llama.cpp's code for this architecture does not compute."""
    for key, allowed in fixed.items():
        value = config.get(key)
        if value is not None and value not in allowed:
            only = f"with {' or '.join(map(repr, allowed))} only" if allowed else "without it"
            raise ArchitectureError(
                f"config.json sets {key} to {value!r}, but llama.cpp computes "
                f"{class_name(config)} {only}"
            )


def integer(config: Config, *keys: str, default: int | None = None) -> int:
    """A size or count under the first of ``keys`` that is there, from 1 to 2**31-1."""
    return _whole(config, keys, default, 1)


def count(config: Config, *keys: str, default: int | None = None) -> int:
    """A number of things that may be none, under the first of ``keys`` that is there."""
    return _whole(config, keys, default, 0)


def number(config: Config, *keys: str, default: float | None = None) -> float:
    """A finite number under the first of ``keys`` that is there.

    What norms add to a mean square, under keys such as ``rms_norm_eps``, is not below zero: ggml
    aborts there.
    """
    key, value = _find(config, keys, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise _wrong(config, key, value, "a finite number")
    if value < 0 and key.endswith(("eps", "epsilon")):
        raise _wrong(config, key, value, "a number from 0 on")
    return float(value)


def positive(config: Config, *keys: str, default: float | None = None) -> float:
    """A finite number above zero under the first of ``keys`` that is there."""
    value = number(config, *keys, default=default)
    if value <= 0:
        raise _wrong(config, keys[0], value, "a number above 0")
    return value


def flag(config: Config, key: str, default: bool = False) -> bool:
    """A truth value."""
    _, value = _find(config, (key,), default)
    if not isinstance(value, bool):
        raise _wrong(config, key, value, "true or false")
    return value


def _whole(config: Config, keys: tuple[str, ...], default: int | None, least: int) -> int:
    key, value = _find(config, keys, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST:
        raise _wrong(config, key, value, f"a whole number from {least} to {_LARGEST}")
    return value


def listing(config: Config, key: str, *kinds: type, length: int | None = None) -> list[Any] | None:
    """A list under ``key`` of values that are of these ``kinds``; None where there is none."""
    found = config.get(key)
    if found is None:
        return None
    fits = isinstance(found, list) and all(isinstance(item, kinds) for item in found)
    if not fits or (length is not None and len(found) != length):
        names = " or ".join(kind.__name__ for kind in kinds)
        long = "" if length is None else f"{length} "
        raise _wrong(config, key, found, f"a list of {long}values of type {names}")
    return list(found)


def _find(config: Config, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
    for key in keys:
        if config.get(key) is not None:
            return key, config[key]
    if default is None:
        raise ArchitectureError(
            f"config.json has no {' or '.join(keys)}, which {class_name(config)} needs"
        )
    return keys[0], default


def _wrong(config: Config, key: str, value: Any, expected: str) -> ArchitectureError:
    return ArchitectureError(
        f"{key} of {class_name(config)} in config.json is {value!r}, expected {expected}"
    )
