"""nf4, fp4 and int8 as bitsandbytes writes them, against what it makes of them itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantcli.sources.hf import HfCheckpoint, open_checkpoint

torch = pytest.importorskip("torch")
from bitsandbytes import functional  # noqa: E402 - after the skip
from safetensors.torch import save_file  # noqa: E402

NAME = "model.layers.0.mlp.up_proj.weight"
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def weights(rows: int, columns: int) -> Any:
    generator = torch.Generator().manual_seed(4)
    sizes = torch.rand(rows, 1, generator=generator) + 0.2
    return torch.randn(rows, columns, generator=generator) * sizes


def save(folder: Path, tensors: dict[str, Any], **settings: Any) -> HfCheckpoint:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return open_checkpoint(folder)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [((96, 128), 64), ((300, 72), 64), ((37, 45), 64), ((64, 256), 256)],
    ids=["blocks in rows", "blocks across rows", "odd rows", "blocks of 256"],
)
def test_four_bits(
    kind: str, nested: bool, shape: tuple[int, int], size: int, tmp_path: Path
) -> None:
    packed, state = functional.quantize_4bit(
        weights(*shape), quant_type=kind, blocksize=size, compress_statistics=nested
    )
    parts = {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    store = save(tmp_path, {NAME: packed, **parts}, **FOUR)
    assert list(store.tensors) == [NAME]
    info = store.tensors[NAME]
    assert info.dtype.startswith(f"bitsandbytes {kind}, blocks of {size}")
    assert info.shape == shape
    assert info.nbytes == packed.nbytes + sum(value.nbytes for value in parts.values())
    expected = functional.dequantize_4bit(packed, state).numpy()
    for start, stop in [(0, shape[0]), (0, 1), (5, 32), (33, 34), (shape[0] - 1, shape[0])]:
        found = store.read_rows(NAME, start, stop)
        np.testing.assert_allclose(found, expected[start:stop], rtol=2e-7, atol=1e-9)
    np.testing.assert_array_equal(
        store.read_columns(NAME, 3, 9), store.read_rows(NAME, 0, shape[0]).T[3:9]
    )
    store.close()


def test_storage_of_another_dtype(tmp_path: Path) -> None:
    """``bnb_4bit_quant_storage`` declares the bytes as other numbers, for sharding."""
    packed, state = functional.quantize_4bit(
        weights(64, 64), quant_type="nf4", quant_storage=torch.bfloat16
    )
    assert packed.dtype == torch.bfloat16
    parts = {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    store = save(tmp_path, {NAME: packed, **parts}, **FOUR)
    expected = functional.dequantize_4bit(packed, state).numpy()
    np.testing.assert_allclose(store.read_rows(NAME, 0, 64), expected, rtol=2e-7, atol=1e-9)
    store.close()


def test_eight_bits(tmp_path: Path) -> None:
    codes, stats, _ = functional.int8_vectorwise_quant(weights(48, 64).half())
    module = NAME.removesuffix(".weight")
    tensors = {NAME: codes, f"{module}.SCB": stats}
    tensors[f"{module}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    store = save(tmp_path, tensors, quant_method="bitsandbytes", load_in_8bit=True)
    assert list(store.tensors) == [NAME]
    assert store.tensors[NAME].dtype == "bitsandbytes int8, per row"
    expected = functional.int8_vectorwise_dequant(codes, stats).numpy()
    np.testing.assert_array_equal(store.read_rows(NAME, 0, 48), expected)
    np.testing.assert_array_equal(store.read_rows(NAME, 11, 12), expected[11:12])
    np.testing.assert_array_equal(store.read_columns(NAME, 5, 9), expected.T[5:9])
    store.close()
