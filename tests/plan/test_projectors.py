"""A tower's GGUF (mmproj) as a source: the types that llama.cpp's own quantizer gives it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from support.llama_quantize import llama_quantize

import quantcli

SHAPES = {
    "v.patch_embd.weight": (64, 3, 14, 14),
    "v.position_embd.weight": (16, 256),
    "v.blk.0.attn_q.weight": (256, 256),
    "v.blk.0.ffn_up.weight": (512, 256),
    "v.blk.0.ffn_down.weight": (256, 512),
    "v.blk.0.ln1.weight": (256,),
    "mm.0.weight": (256, 256),
    "mm.0.bias": (256,),
}


@pytest.fixture(scope="module", params=["vision", "audio"])
def projector(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mmproj") / "mmproj.gguf"
    random, writer = np.random.default_rng(0), GGUFWriter(path, "clip")
    writer.add_string("general.type", "mmproj")
    writer.add_bool(f"clip.has_{request.param}_encoder", True)
    writer.add_uint32(f"clip.{request.param}.block_count", 1)
    for name, shape in SHAPES.items():
        writer.add_tensor(name, (random.standard_normal(shape) * 0.05).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "Q4_K_M"])
def test_types_and_bytes_are_llama_cpps(kind: str, projector: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    quantcli.quantize(projector, ours, type=kind)
    llama_quantize(projector, theirs, kind)
    found = {t.name: (t.tensor_type, t.data.tobytes()) for t in GGUFReader(ours).tensors}
    wanted = {t.name: (t.tensor_type, t.data.tobytes()) for t in GGUFReader(theirs).tensors}
    assert found == wanted
