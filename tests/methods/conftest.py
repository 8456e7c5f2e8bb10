"""Tiny checkpoints, each built once for all tests of the methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from support.tiny_models import build

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """``checkpoint(name, dtype="float32")``: the folder of a model in `support.tiny_models`."""
    pytest.importorskip("transformers", reason="transformers writes the tiny models")

    @cache
    def folder(name: str, dtype: str = "float32") -> Path:
        return build(name, tmp_path_factory.mktemp(f"{name}-{dtype}"), dtype=dtype)

    return folder
