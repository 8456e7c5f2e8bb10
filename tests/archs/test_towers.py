"""Vision towers: what llama.cpp sees in an image is what transformers sees, for every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny_towers import TINY, build

from quantcli import quantize
from quantcli.archs.towers import TOWERS

mtmd = pytest.importorskip("support.mtmd", reason="mtmd is the oracle for towers")
pytest.importorskip("transformers", reason="transformers is the oracle for towers")

SAME = {
    "Qwen3VLMoeForConditionalGeneration": "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration": "Qwen3VLForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3VLForConditionalGeneration",
}
"""Classes whose tower is another class's, to the last tensor."""


@pytest.mark.parametrize("name", TINY)
def test_llama_cpp_sees_what_transformers_sees(name: str, tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "model"
    model = build(name, folder)
    image = np.random.default_rng(3).integers(0, 256, (*TINY[name].image, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = TINY[name].look(model, image).numpy()
    made = quantize(folder, tmp_path / "text.gguf", type="F32", mmproj_type="F32")

    assert made.mmproj is not None
    found = mtmd.embed_image(made.paths[0], made.mmproj, image)[: len(expected)]

    assert found.shape == expected.shape
    assert np.abs(found - expected).max() / expected.std() < 6e-3


def test_every_line_of_the_registry_is_tried() -> None:
    tried = {tiny.towered or tiny.model for tiny in TINY.values()}
    assert {name for name in TOWERS if name not in tried} == SAME.keys()
    for name, other in SAME.items():
        assert TOWERS.get(name) is TOWERS.get(other)
