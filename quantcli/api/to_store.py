"""Calls whose ``output`` may be in an object store: made here, uploaded, and told by address."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from quantcli.api.calls import Watch
from quantcli.events import drain
from quantcli.exports.to_store import StoreOutput, stage_output

P = ParamSpec("P")
T = TypeVar("T")

_NEED_FILES = ("resume", "push", "shard")
"""Options that need the output on this machine."""


def into_store(function: Callable[P, T]) -> Callable[P, T]:
    """The function with an ``output`` that may be an address such as ``s3://bucket/model.gguf``."""
    parameters = signature(function)

    @wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> T:
        given = parameters.bind(*args, **keywords)
        words = given.arguments
        refused = {name: words.get(name) for name in _NEED_FILES}
        dry_run, force = bool(words.get("dry_run")), bool(words.get("force"))
        place = words.get("output")
        store = stage_output(
            place if isinstance(place, str) else None, force=force, dry_run=dry_run,
            scratch=words.get("scratch"), **refused,
        )  # fmt: skip
        if store is None:
            return function(*args, **keywords)
        with store:
            words["output"] = store.place
            result = function(*given.args, **given.kwargs)
            if not dry_run:
                drain(store.publish(), Watch(words.get("on_event")))
            return cast(T, _label(store, result))

    return call


def _label(store: StoreOutput, result: Any) -> Any:
    """A result with the store's addresses for paths, documents and tables."""
    if isinstance(result, tuple):
        return tuple(_label(store, each) for each in result)
    if isinstance(result, Path | str | dict):
        return store.label(result)
    if is_dataclass(result) and not isinstance(result, type):
        told = {"paths", "document", "outputs", "mmproj", "tables", "report"}
        named = {each.name for each in fields(result)} & told
        if not named:
            return store.label(result)
        return replace(result, **{name: _label(store, getattr(result, name)) for name in named})
    return result
