"""Model folders of the small real model, made once for each recipe, and the model they mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.model_folders import CHECKPOINT, make_folder

MakeFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """``folder(to, **recipe)``: the small model's folder."""
    root = tmp_path_factory.mktemp("folders")
    made: dict[str, Path] = {}

    def make(to: str, **recipe: Any) -> Path:
        key = re.sub(r"\W+", "-", f"{to} {recipe}")
        if key not in made:
            make_folder(CHECKPOINT, root / key, to=to, **recipe)
            made[key] = root / key
        return made[key]

    return make


@pytest.fixture(scope="session")
def weights() -> dict[str, np.ndarray]:
    """The small model's weights in float32, read by the safetensors library."""
    import ml_dtypes  # noqa: F401
    from safetensors.numpy import load_file

    stored = load_file(CHECKPOINT / "model.safetensors")
    return {name: value.astype(np.float32) for name, value in stored.items()}
