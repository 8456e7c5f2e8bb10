"""What headers alone tell of a checkpoint, of one nobody knows, and of a GGUF."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.gguf_files import MODEL_TYPES, write_model

from quantcli.errors import SourceError
from quantcli.report.document import model_document
from quantcli.report.inspection import Subject
from quantcli.report.opening import open_subject
from quantcli.report.overview import overview_tables
from quantcli.report.weights import WeightStatsDone, measure_weights
from quantcli.sources.resolve import resolve

MINI_PARAMETERS = 4_196_608


def _open(path, label) -> Subject:
    return open_subject(resolve(str(path)), label)


def _facts(subject) -> dict[str, str]:
    return dict(overview_tables(subject)[0].rows)


def test_a_checkpoint_we_know(mini):
    with _open(mini, "mini") as subject:
        assert subject.parameters == MINI_PARAMETERS
        assert subject.embedding_parameters == 4096 * 256
        assert subject.is_tied
        assert subject.active_parameters is None
        assert subject.notes == ()
        stored = {tensor.info.name: tensor for tensor in subject.tensors}
        assert stored["model.layers.2.mlp.up_proj.weight"].becomes == ("blk.2.ffn_up.weight",)
        assert subject.bits_per_weight == 16
        facts = _facts(subject)
        assert facts["Architecture"] == "llama (LlamaForCausalLM)"
        assert facts["Layers"] == "4 blocks, 256 wide, feed-forward 768"
        assert facts["Attention"] == "4 heads of 64, 2 key-value heads"
        assert facts["Context"] == "2,048 tokens"
        assert facts["Vocabulary"] == "4,096 tokens, byte-level BPE"
        assert facts["Stored as"] == "BF16, 38 tensors, 8.39 MB, 16.00 bits per weight"


def test_every_weight_is_counted_once_in_every_view(mini):
    expected = sum(array.size for array in load_mini(mini).values())
    with _open(mini, "mini") as subject:
        assert subject.parameters == expected
        assert sum(source.rows * source.columns for source in subject.sources) == expected
        assert sum(elements for _, _, elements, _ in subject.dtypes()) == expected
        assert subject.nbytes == 2 * expected


def load_mini(mini):
    import ml_dtypes  # noqa: F401 - gives NumPy the bfloat16 of the file

    return load_file(mini / "model.safetensors")


def test_the_memory_table_is_weights_times_bits(mini):
    with _open(mini, "mini") as subject:
        memory = {row["precision"]: row["bytes"] for row in model_document(subject, [])["memory"]}
    assert memory == {
        "float32": 4 * MINI_PARAMETERS,
        "bfloat16": 2 * MINI_PARAMETERS,
        "int8": MINI_PARAMETERS,
        "int4": MINI_PARAMETERS // 2,
        "int3": 3 * MINI_PARAMETERS // 8,
        "int2": MINI_PARAMETERS // 4,
    }


def test_the_owner_of_70_billion_sees_280_against_35():
    from quantcli.report.memory import memory_table
    from quantcli.report.units import size_text

    texts = {each.name: size_text(each.nbytes) for each in memory_table(70 * 10**9)}
    assert (texts["float32"], texts["int4"]) == ("280 GB", "35.0 GB")


def test_sizes_are_told_finest_first_and_shrink(mini):
    with _open(mini, "mini") as subject:
        sizes = {each.name: each.nbytes for each in subject.sizes}
    assert {"F32", "F16", "BF16", "Q8_0", "Q4_K_M", "Q2_K"} <= set(sizes)
    assert sizes["F32"] > sizes["BF16"] > sizes["Q8_0"] > sizes["Q4_K_M"] > sizes["Q2_K"]
    assert sizes["F32"] == 4 * MINI_PARAMETERS


def test_an_unknown_architecture_is_still_listed(variant):
    folder = variant(architectures=["FooForCausalLM"])
    with _open(folder, "foo") as subject:
        assert len(subject.tensors) == 38
        assert subject.parameters == MINI_PARAMETERS
        assert subject.sizes == ()
        assert len(subject.notes) == 1
        assert subject.notes[0].startswith(
            "there is no table for FooForCausalLM: its linear layers"
        )
        assert "there are 29 with the embedding and the head" in subject.notes[0]
        facts = _facts(subject)
        assert facts["Architecture"] == "FooForCausalLM (unknown to quantcli)"
        assert facts["Layers"] == "4 blocks, 256 wide, feed-forward 768"
        assert {source.name for source in subject.sources} == {
            tensor.info.name for tensor in subject.tensors
        }
        assert model_document(subject, subject.tensors)["quantized"] == []


def test_a_model_that_is_quantized_in_a_way_of_its_own_is_still_listed(variant):
    folder = variant(quantization_config={"quant_method": "hqq", "bits": 4})
    with _open(folder, "hqq") as subject:
        assert len(subject.tensors) == 38
        assert subject.sources == ()
        assert "quantized with hqq" in subject.notes[0]
        assert _facts(subject)["Context"] == "2,048 tokens"


def test_a_checkpoint_without_settings_is_still_listed(variant):
    folder = variant()
    (folder / "config.json").unlink()
    with _open(folder, "bare") as subject:
        assert len(subject.tensors) == 38
        assert "config.json" in subject.notes[0]
        assert _facts(subject)["Architecture"] == "not named (unknown to quantcli)"


def test_a_broken_checkpoint_is_an_error(variant, mini):
    folder = variant()
    weights = folder / "model.safetensors"
    weights.unlink()
    weights.write_bytes((mini / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        _open(folder, "broken")


def test_tensors_of_indices_are_listed_but_are_no_weights(tmp_path, mini):
    shutil.copy(mini / "config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["X"]}))
    arrays = {
        "w": np.ones((4, 8), np.float32),
        "position_ids": np.arange(100),
        "mask": np.ones((3, 3), bool),
        "scalar": np.array(2.5, np.float32),
    }
    save_file(arrays, tmp_path / "model.safetensors")
    with _open(tmp_path, "x") as subject:
        assert len(subject.tensors) == 4
        assert subject.parameters == 33
        assert {source.name for source in subject.sources} == {"w", "scalar"}
        *_, measured = measure_weights(subject.sources, 1)
        assert isinstance(measured, WeightStatsDone)
        assert measured.stats["scalar"].moments.high == 2.5


def test_a_gguf(tmp_path):
    path = tmp_path / "m.gguf"
    write_model(path)
    with _open(path, "m.gguf") as subject:
        assert {t.info.name: (t.info.dtype, t.info.shape) for t in subject.tensors} == MODEL_TYPES
        assert subject.sizes == (), "weights that are quantized already have no honest size"
        facts = _facts(subject)
        assert facts["Architecture"] == "llama"
        assert facts["Vocabulary"] == "1,000 tokens, byte-level BPE (llama-bpe)"
        assert facts["Stored as"].startswith("Q4_K_M, 6 tensors, ")
        assert facts["Made by"] == "quantcli 9.8.7 from org/name@abc123"
        document = model_document(subject, subject.tensors)
        assert document["file_type"] == "Q4_K_M"
        assert document["metadata"]["llama.block_count"] == {"kind": "u32", "value": 11}
        tokens = document["metadata"]["tokenizer.ggml.tokens"]
        assert tokens == {"kind": "[str]", "length": 1000, "first": [f"t{i}" for i in range(6)]}


def test_a_gguf_of_floats_tells_what_types_would_give(tmp_path):
    path = tmp_path / "m.gguf"
    shapes = {
        "token_embd.weight": (1000, 256), "output_norm.weight": (256,),
        "blk.0.attn_q.weight": (256, 256), "blk.0.ffn_down.weight": (256, 512),
    }  # fmt: skip
    write_model(path, {name: ("F32", shape) for name, shape in shapes.items()})
    with _open(path, "m.gguf") as subject:
        sizes = {each.name: each.nbytes for each in subject.sizes}
    assert sizes["F32"] == 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    assert sizes["Q8_0"] == (1000 * 256 + 256 * 256 + 256 * 512) // 32 * 34 + 4 * 256


def test_the_document_is_json(mini, tmp_path):
    path = tmp_path / "m.gguf"
    write_model(path)
    with _open(mini, "mini") as checkpoint, _open(path, "m") as model:
        for subject in (checkpoint, model):
            for full in (False, True):
                document = model_document(subject, subject.tensors, full_values=full)
                json.dumps(document, allow_nan=False)
