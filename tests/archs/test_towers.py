"""Vision towers: what llama.cpp sees in an image is what transformers sees, for every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support import tiny_models
from support.tiny_towers import EARS, TINY, WIDTH, build

from quantcli import quantize

mtmd = pytest.importorskip("support.mtmd", reason="mtmd is the oracle for towers")
pytest.importorskip("transformers", reason="transformers is the oracle for towers")


@pytest.fixture(scope="module")
def plain_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model as wide as those that the towers belong to."""
    folder = tmp_path_factory.mktemp("text")
    tiny_models.build("llama-tied", folder)
    return quantize(folder, folder / "text.gguf", type="F32").paths[0]


@pytest.mark.parametrize("name", TINY)
def test_llama_cpp_sees_what_transformers_sees(name: str, plain_text: Path, tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "model"
    model = build(name, folder)
    is_ear = TINY[name].look in EARS
    seen = _sound(*TINY[name].image) if is_ear else _image(*TINY[name].image)
    with torch.no_grad():
        expected = TINY[name].look(model, seen).numpy()
    tower = quantize(folder, tmp_path / "tower.gguf", type="F32", mmproj_only=True).paths[0]
    text = plain_text
    if expected.shape[1] != WIDTH:
        text = quantize(folder, tmp_path / "text.gguf", type="F32").paths[0]

    embed = mtmd.embed_sound if is_ear else mtmd.embed_image
    found = embed(text, tower, seen)[: len(expected)]

    assert found.shape == expected.shape
    # llama.cpp clears the rows of [IMG_BREAK] by multiplying what was in memory by 0.
    sane = np.isfinite(found).all(axis=1)
    assert sane.mean() > (0.7 if TINY[name].token else 0.999)
    errors = (found - expected)[sane] / expected.std()
    # GELU and convolutions pass float16; a row or a sign that is wrong gives 0.1 and more.
    assert np.sqrt(np.square(errors).mean()) < 4e-3
    assert np.abs(errors).max() < 2e-2


def _image(rows: int, columns: int) -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def _sound(seconds: int, rate: int) -> NDArray[np.float32]:
    """A rising tone and noise."""
    time = np.arange(seconds * rate) / rate
    tone = 0.3 * np.sin(2 * np.pi * 440 * time * (1 + 0.1 * time))
    noise = 0.05 * np.random.default_rng(0).standard_normal(len(time))
    return (tone + noise).astype(np.float32)
