"""A GGUF of an architecture without a table, as llama.cpp's converter makes it: the way to a GGUF
for a checkpoint that quantcli does not know, with and without an importance matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from support.gguf_files import write_imatrix

import quantcli
from quantcli.archs import ARCHITECTURES
from quantcli.errors import ArchitectureError, PlanError

HIDDEN, WIDE, EXPERTS, BLOCKS = 256, 512, 4, 4

MATRICES = {
    "attn_qkv.weight": (HIDDEN + 128, HIDDEN),
    "attn_output.weight": (HIDDEN, HIDDEN),
    "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
    "ffn_gate_exps.weight": (EXPERTS, WIDE, HIDDEN),
    "ffn_up_exps.weight": (EXPERTS, WIDE, HIDDEN),
    "ffn_down_exps.weight": (EXPERTS, HIDDEN, WIDE),
}


def _write(path: Path, arch: str) -> Path:
    """Random weights in bfloat16, norms and routers in float32, as the converter has them."""
    random, writer = np.random.default_rng(4), GGUFWriter(path, arch)
    for add, value in (
        (writer.add_block_count, BLOCKS), (writer.add_context_length, 512),
        (writer.add_embedding_length, HIDDEN), (writer.add_feed_forward_length, WIDE),
        (writer.add_head_count, 4), (writer.add_head_count_kv, 1),
        (writer.add_expert_count, EXPERTS), (writer.add_expert_used_count, 2),
        (writer.add_layer_norm_eps, 1e-5), (writer.add_clamp_kqv, 8.0), (writer.add_file_type, 32),
        (writer.add_vocab_size, 1024),
    ):  # fmt: skip
        add(value)
    shapes = {"token_embd.weight": (1024, HIDDEN), "output_norm.weight": (HIDDEN,),
              "output.weight": (1024, HIDDEN)}  # fmt: skip
    for block in range(BLOCKS):
        for name in ("attn_norm.weight", "attn_output_norm.weight"):
            shapes[f"blk.{block}.{name}"] = (HIDDEN,)
        shapes |= {f"blk.{block}.{name}": shape for name, shape in MATRICES.items()}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32) * 0.1
        if len(shape) == 1 or "gate_inp" in name:
            writer.add_tensor(name, values)
        else:
            stored = values.astype(ml_dtypes.bfloat16).view(np.uint8)
            writer.add_tensor(name, stored, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _importance() -> dict[str, tuple[Any, Any]]:
    """Sums of squares and counts for every matrix in the blocks, as llama-imatrix collects them."""
    random, found = np.random.default_rng(5), {}
    for block in range(BLOCKS):
        for name, shape in MATRICES.items():
            matrices = shape[0] if len(shape) > 2 else 1
            sums = np.exp(random.standard_normal((matrices, shape[-1]))).astype(np.float32)
            counts = np.full((matrices, 1), 512, np.float32)
            found[f"blk.{block}.{name}"] = (sums * 512, counts)
    return found


def _tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(path).tensors}


def test_no_table_knows_it() -> None:
    assert "dbrx" not in {ARCHITECTURES.get(name).name for name in ARCHITECTURES}


@pytest.mark.parametrize("kind", ["Q4_K_M", "IQ2_XS", "Q3_K_S"])
@pytest.mark.parametrize("weighted", [True, False])
def test_it_is_what_llama_cpps_own_quantizer_makes(
    kind: str, weighted: bool, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    from support.llama_quantize import llama_quantize

    source = _write(tmp_path / "bf16.gguf", "dbrx")
    if kind.startswith("IQ2") and not weighted:
        with pytest.raises(PlanError, match="needs an importance matrix"):
            quantcli.quantize(source, tmp_path / "ours.gguf", type=kind)
        return
    entries = _importance() if weighted else {}
    given = {"imatrix": str(write_imatrix(tmp_path / "i.gguf", entries))} if weighted else {}
    ours = quantcli.quantize(source, tmp_path / "ours.gguf", type=kind, **given).paths[0]
    means = {name: (sums / counts).ravel() for name, (sums, counts) in entries.items()}
    llama_quantize(source, tmp_path / "theirs.gguf", kind, imatrix=means)
    found, expected = _tensors(ours), _tensors(tmp_path / "theirs.gguf")
    assert {name: held[0] for name, held in found.items()} == {
        name: held[0] for name, held in expected.items()
    }
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize("legacy", [False, True])
def test_an_architecture_that_nobody_knows_takes_an_importance_matrix(
    legacy: bool, tmp_path: Path
) -> None:
    source = _write(tmp_path / "bf16.gguf", "nobody")
    matrix = write_imatrix(tmp_path / "i.gguf", _importance())
    if legacy:
        matrix = quantcli.export(matrix, to="dat", output=tmp_path / "i.dat").paths[0]
    done = quantcli.quantize(source, tmp_path / "m.gguf", type="IQ3_XXS", imatrix=str(matrix))
    assert not any("importance" in note.message for note in done.notes if note.level == "warning")
    plain = quantcli.quantize(source, tmp_path / "plain.gguf", type="Q4_0")
    weighted = quantcli.quantize(source, tmp_path / "w.gguf", type="Q4_0", imatrix=str(matrix))
    kinds = [_tensors(each.paths[0])["blk.1.ffn_up_exps.weight"] for each in (plain, weighted)]
    assert kinds[0][0] == kinds[1][0] == "Q4_0"
    assert kinds[0][1] != kinds[1][1]


def test_a_folder_of_it_is_refused_whatever_config_is_given(tmp_path: Path) -> None:
    source = _write(tmp_path / "bf16.gguf", "nobody")
    with pytest.raises(ArchitectureError, match="cannot be told from its GGUF: it has no table"):
        quantcli.export(source, to="hf", output=tmp_path / "hf")
    (tmp_path / "config.json").write_text('{"architectures": ["NobodyForCausalLM"]}')
    with pytest.raises(ArchitectureError) as refused:
        quantcli.export(source, to="hf", output=tmp_path / "hf", config=tmp_path)
    assert "architecture NobodyForCausalLM is not supported" in refused.value.message
    assert refused.value.hint == "the checkpoint that it was made from needs no table"
