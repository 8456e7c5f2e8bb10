"""Tiny checkpoints and the small real model, each built once for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import build

Checkpoint = Callable[..., Path]

# Threads that wait by spinning take the cores from the other worker of pytest-xdist.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def mini() -> Path:
    """A small real checkpoint."""
    return Path(__file__).parent / "data" / "bookworm-mini"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """``checkpoint(name, dtype="float32")``: the folder of a model in `support.tiny_models`."""
    pytest.importorskip("transformers", reason="transformers writes the tiny models")

    @cache
    def folder(name: str, dtype: str = "float32") -> Path:
        return build(name, tmp_path_factory.mktemp(f"{name}-{dtype}"), dtype=dtype)

    return folder


@pytest.fixture(scope="session")
def gguf(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """``gguf(name, type)``: a tiny model as quantcli quantizes it."""
    from quantcli.artifacts.gguf_file import prepare_gguf
    from quantcli.artifacts.write import write_artifact
    from quantcli.model import open_model
    from quantcli.plan.recipe import Recipe

    @cache
    def file(name: str, kind: str) -> Path:
        path = tmp_path_factory.mktemp("gguf") / f"{name}-{kind}.gguf"
        with open_model(checkpoint(name)) as model:
            for _ in write_artifact(prepare_gguf(model, Recipe(type=kind), path), threads=2):
                pass
        return path

    return file


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again over a network is tried again soon."""
    from quantcli.sources import patience

    monkeypatch.setattr(patience, "FIRST_WAIT", 0.002)
    monkeypatch.setattr(patience, "LONGEST_WAIT", 0.01)


@pytest.fixture(autouse=True)
def _documents_follow_their_schemas(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a command prints with --json in this process is held against its schema."""
    if "hostile" in request.path.parts:
        return  # where a model's own oddities are what is printed
    from support.json_schemas import check_document

    from quantcli.cli.output import Output

    write = Output.document

    def checked(self: Output, kind: str, version: int, fields: Mapping[str, Any]) -> None:
        check_document(kind, version, {"schema": f"quantcli.{kind}/{version}", **fields})
        write(self, kind, version, fields)

    monkeypatch.setattr(Output, "document", checked)
