"""The small real model as GGUF files of several types, and a text that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data"
CHECKPOINT = DATA / "bookworm-mini"
TEXT = DATA / "pride-and-prejudice.txt"

MakeGguf = Callable[[str], Path]


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> MakeGguf:
    """``gguf(type)``: the checkpoint as quantcli quantizes it."""
    from quantcli.artifacts.gguf_file import prepare_gguf
    from quantcli.artifacts.write import write_artifact
    from quantcli.model import open_model
    from quantcli.plan.recipe import Recipe

    folder = tmp_path_factory.mktemp("gguf")

    @cache
    def file(kind: str) -> Path:
        path = folder / f"mini-{kind}.gguf"
        with open_model(CHECKPOINT) as model:
            for _ in write_artifact(prepare_gguf(model, Recipe(type=kind), path), threads=2):
                pass
        return path

    return file
