"""Tiny checkpoints in bfloat16, and the GGUF files quantcli makes of them, each built once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from support.tiny_models import build

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """``checkpoint(name)``: a model of `support.tiny_models`, in a folder whose name says nothing.

    llama.cpp takes the name of a Phi-3 for a promise about its tokens.
    """

    @cache
    def folder(name: str) -> Path:
        return build(name, tmp_path_factory.mktemp("model"), dtype="bfloat16")

    return folder


@pytest.fixture(scope="session")
def gguf(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """``gguf(name, type)``: a tiny model as quantcli quantizes it."""
    import quantcli

    @cache
    def file(name: str, kind: str) -> Path:
        path = tmp_path_factory.mktemp("gguf") / f"{name}-{kind}.gguf"
        return quantcli.quantize(checkpoint(name), path, type=kind, threads=2).paths[0]

    return file
