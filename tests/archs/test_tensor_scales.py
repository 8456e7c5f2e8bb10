"""Where the real llama.cpp multiplies by a scale beside a weight, and where it leaves it out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf as library
import numpy as np
import pytest
from support.tiny_models import MODELS

from quantcli.tensor_scales import SCALED

pytest.importorskip("llama_cpp")

FACTOR = np.float32(1.5)
TOKENS = [7, 300, 5, 1200, 42, 9, 77, 500]
NAMES = {
    "chatglm": "glm", "cohere2moe": "cohere2-moe", "command-r": "cohere",
    "falcon": "falcon-7b", "glm4moe": "glm4-moe", "lfm2moe": "lfm2-moe", "nemotron_h": "nemotron-h",
    "nemotron_h_moe": "nemotron-h-moe", "qwen2moe": "qwen2-moe", "qwen2vl": "qwen2-vl",
    "qwen35moe": "qwen35-moe", "qwen3moe": "qwen3-moe", "qwen3next": "qwen3-next",
    "qwen3vl": "qwen3-vl", "qwen3vlmoe": "qwen3-vl-moe", "seed_oss": "seed-oss",
}  # fmt: skip
"""Tiny models by architecture, where they are called otherwise."""


def rewrite(source: Path, target: Path, *, scales: bool) -> set[str]:
    """``source`` with every weight that takes a scale FACTOR times as large, by one or by itself.

    Returns the leaves that there are.
    """
    reader = library.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    biases = {tensor.name for tensor in reader.tensors if tensor.name.endswith(".bias")}
    writer = library.GGUFWriter(target, arch)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], kind)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    # Blocks for multi-token prediction, which most graphs leave unused, get none.
    last = keys[f"{arch}.block_count"] - keys.get(f"{arch}.nextn_predict_layers", 0)
    found = set()
    for tensor in reader.tensors:
        values = np.array(tensor.data).reshape([int(n) for n in tensor.shape][::-1])
        block, _, leaf = tensor.name.removesuffix(".weight").rpartition(".")
        mlp = leaf in ("ffn_gate", "ffn_up", "ffn_down")
        takes = tensor.name.startswith("blk.") and leaf in SCALED[arch]
        takes &= not (mlp and f"{block}.{leaf}.bias" in biases)
        takes &= not tensor.name.startswith("blk.") or int(block.split(".")[1]) < last
        if takes and tensor.name.endswith(".weight"):
            found.add(leaf)
            values = values if scales else values * FACTOR
        writer.add_tensor(tensor.name, values.astype(np.float32))
        if takes and scales and tensor.name.endswith(".weight"):
            count = len(values) if values.ndim == 3 else 1
            writer.add_tensor(f"{block}.{leaf}.scale", np.full(count, FACTOR))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in SCALED if NAMES.get(arch, arch) in MODELS])
def test_llama_cpp_multiplies_by_every_scale_that_we_write(
    arch: str, gguf: Callable[[str, str], Path], tmp_path: Path
) -> None:
    from support.llama_logits import llama_logits

    source = gguf(NAMES.get(arch, arch), "F32")
    found = rewrite(source, tmp_path / "scaled.gguf", scales=True)
    assert found == rewrite(source, tmp_path / "multiplied.gguf", scales=False)
    scaled, multiplied, plain = (
        llama_logits(path, TOKENS)
        for path in (tmp_path / "scaled.gguf", tmp_path / "multiplied.gguf", source)
    )
    assert np.abs(scaled - multiplied).max() < 2e-3 * multiplied.std()
    # Norms behind the matrices take most of it out again in some families.
    assert np.abs(plain - multiplied).max() > 2 * np.abs(scaled - multiplied).max()
    assert np.abs(plain - multiplied).max() > 5e-3 * multiplied.std()
    assert "attn_output" in found
