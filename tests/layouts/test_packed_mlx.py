"""MLX's affine folders, packed and unpacked by MLX itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantcli.sources.hf import HfCheckpoint, open_checkpoint

mx = pytest.importorskip("mlx.core")

ROWS, COLUMNS = 40, 256
NAME = "model.layers.0.mlp.up_proj"


def weights(*shape: int) -> Any:
    random = np.random.default_rng(6)
    sizes = random.uniform(0.2, 1.2, (*shape[:-1], 1))
    return mx.array((random.standard_normal(shape) * sizes + sizes).astype(np.float32))


def save(folder: Path, modules: dict[str, Any], quantization: dict[str, Any]) -> HfCheckpoint:
    tensors = {
        f"{module}.{key}": value
        for module, parts in modules.items()
        for key, value in zip(("weight", "scales", "biases"), parts, strict=True)
    }
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    settings = {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(settings))
    return open_checkpoint(folder)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_affine(bits: int, group: int, tmp_path: Path) -> None:
    parts = mx.quantize(weights(ROWS, COLUMNS), group_size=group, bits=bits)
    store = save(tmp_path, {NAME: parts}, {"group_size": group, "bits": bits, "mode": "affine"})
    expected = np.array(mx.dequantize(*parts, group_size=group, bits=bits))
    name = f"{NAME}.weight"
    assert list(store.tensors) == [name]
    assert store.tensors[name].dtype == f"MLX int{bits}, groups of {group}"
    assert store.tensors[name].nbytes == sum(part.nbytes for part in parts)
    for start, stop in [(0, ROWS), (0, 1), (7, 33), (39, 40)]:
        # MLX multiplies and adds in one rounding, or in two.
        np.testing.assert_allclose(
            store.read_rows(name, start, stop), expected[start:stop], rtol=1e-6, atol=1e-6
        )
    store.close()


def test_stacks_and_modules_of_their_own(tmp_path: Path) -> None:
    """Stacked experts, and bits and groups of a single module."""
    four = mx.quantize(weights(3, ROWS, COLUMNS), group_size=64, bits=4)
    eight = mx.quantize(weights(ROWS, COLUMNS), group_size=32, bits=8)
    quantization = {
        "group_size": 64, "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8}, "lm_head": False,
    }  # fmt: skip
    store = save(tmp_path, {NAME: four, "model.embed_tokens": eight}, quantization)
    assert store.tensors[f"{NAME}.weight"].shape == (3, ROWS, COLUMNS)
    expected = np.array(mx.dequantize(*four, group_size=64, bits=4)).reshape(3 * ROWS, COLUMNS)
    found = store.read_rows(f"{NAME}.weight", 30, 90)
    np.testing.assert_allclose(found, expected[30:90], rtol=1e-6, atol=1e-6)
    expected = np.array(mx.dequantize(*eight, group_size=32, bits=8))
    found = store.read_rows("model.embed_tokens.weight", 0, ROWS)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    store.close()


def test_a_null_group_is_the_usual_one(tmp_path: Path) -> None:
    """mlx_lm's mixed recipes write it for every module."""
    parts = mx.quantize(weights(ROWS, COLUMNS), group_size=64, bits=6)
    own = {"group_size": None, "bits": 6, "mode": "affine"}
    settings = {"group_size": None, "bits": 3, "mode": "affine", NAME: own}
    store = save(tmp_path, {NAME: parts}, settings)
    assert store.tensors[f"{NAME}.weight"].dtype == "MLX int6, groups of 64"
    found = store.read_rows(f"{NAME}.weight", 0, ROWS)
    expected = np.array(mx.dequantize(*parts, group_size=64, bits=6))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    store.close()
