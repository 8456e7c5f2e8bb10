"""``--bits 16`` loses nothing of what is stored in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader
from support.tiny_models import build

import quantcli

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "BF16")]
)
def test_sixteen_bits_of_a_checkpoint(dtype: str, kind: str, tmp_path: Path) -> None:
    source = build("llama", tmp_path / "m", dtype=dtype)
    done = quantcli.quantize(source, tmp_path / "out.gguf", bits=16)
    types = {tensor.tensor_type.name for tensor in GGUFReader(done.paths[0]).tensors}
    assert types == {kind, "F32"}


def test_a_type_by_its_name_is_taken_as_it_is(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = build("llama", tmp_path / "m", dtype="float16")
    done = quantcli.quantize(source, tmp_path / "out.gguf", type="BF16")
    types = {tensor.tensor_type.name for tensor in GGUFReader(done.paths[0]).tensors}
    assert types == {"BF16", "F32"}
