from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from support import all_formats
from support.llama_plan import Shape, write_hollow
from support.model_shapes import MODELS


@pytest.fixture(scope="session")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Shape, Path]]:
    """A model of `MODELS` by its name, and a GGUF of that shape."""
    folder = tmp_path_factory.mktemp("hollow")

    @cache
    def make(name: str) -> tuple[Shape, Path]:
        model = MODELS[name]()
        return model, write_hollow(folder / f"{name}.gguf", model)

    return make


@pytest.fixture
def every_format() -> Iterator[None]:
    """Every type of ggml is in the table of block formats."""
    with pytest.MonkeyPatch.context() as patch:
        all_formats.install(patch)
        yield
