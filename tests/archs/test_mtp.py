"""Blocks for multi-token prediction: written if stored, read back, and left alone by llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from support.tiny_models import MODELS

import quantcli
from quantcli.archs.base import Architecture
from quantcli.archs.decoder import ATTENTION, MLP, NORMS
from quantcli.archs.llama import LLAMA
from quantcli.archs.mtp import Mtp, behind, count_blocks, drop_blocks, nextn_rules
from quantcli.errors import ArchitectureError
from quantcli.types import TensorInfo, array, text, u32

WITH = [name for name, tiny in MODELS.items() if tiny.beside]
KEY = "num_nextn_predict_layers"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, KEY: 1,
}  # fmt: skip
FAMILY: Architecture = replace(
    LLAMA,
    fixed={},
    mtp=Mtp(
        KEY,
        "model.layers.{i}.eh_proj.weight",
        lambda config, blocks: behind(blocks, *NORMS, *ATTENTION, *MLP, *nextn_rules(config)),
        most=2,
    ),
)
"""Llama with blocks as DeepSeek and GLM have them."""
SHARED = ("embed_tokens", "shared_head_head", "shared_head_norm")


def _stored(blocks: int, without: tuple[str, ...] = ()) -> dict[str, TensorInfo]:
    """What a checkpoint with so many blocks holds."""
    config = {**CONFIG, KEY: blocks or None}
    names = FAMILY.sources(config)
    shapes = FAMILY.stored(config, names)
    left_out = tuple(shape for shape in shapes if any(part in shape for part in without))
    return {
        name: TensorInfo(name, shape, "F32", 4 * int(np.prod(shape)), Path("m/x.safetensors"))
        for name, shape in shapes.items()
        if name not in left_out
    }


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_blocks_are_those_that_are_stored(blocks: int) -> None:
    stored = _stored(blocks)
    found = {tensor.name: tensor.shape for tensor in FAMILY.tensors(CONFIG, stored)}
    for index in range(3, 3 + blocks):
        assert found[f"blk.{index}.nextn.eh_proj.weight"] == (8, 16)
        assert found[f"blk.{index}.ffn_down.weight"] == (8, 12)
        assert all(f"blk.{index}.nextn.{name}.weight" in found for name in SHARED)
    assert not any(name.startswith(f"blk.{3 + blocks}.") for name in found)
    keys = FAMILY.metadata(CONFIG, stored=stored)
    assert keys["llama.block_count"] == u32(3 + blocks)
    assert keys.get("llama.nextn_predict_layers") == (u32(blocks) if blocks else None)
    assert FAMILY.stored(CONFIG, found).keys() == stored.keys()
    assert FAMILY.sources(CONFIG, stored).keys() >= found.keys() - {"output.weight"}
    notes = FAMILY.notes(CONFIG, stored)
    assert len(notes) == (0 if blocks else 1)
    assert blocks or "sets num_nextn_predict_layers to 1, but of these blocks" in notes[0]


def test_what_a_block_shares_with_the_model_may_be_left_out() -> None:
    stored = _stored(1, ("layers.3.embed_tokens", "layers.3.shared_head"))
    names = [tensor.name for tensor in FAMILY.tensors(CONFIG, stored)]
    assert "blk.3.nextn.hnorm.weight" in names
    assert not any(part in name for name in names for part in SHARED)


def test_a_block_is_whole_or_refused() -> None:
    stored = _stored(1)
    del stored["model.layers.3.mlp.up_proj.weight"]
    with pytest.raises(
        ArchitectureError, match=r"model\.layers\.3\.mlp\.up_proj\.weight is missing"
    ):
        FAMILY.tensors(CONFIG, stored)
    stored = _stored(1)
    del stored["model.layers.3.eh_proj.weight"]
    with pytest.raises(ArchitectureError, match=r"layers\.3\.\S+ of \S+ is not part of"):
        FAMILY.tensors(CONFIG, stored)


def test_more_than_llama_cpp_takes_is_refused() -> None:
    with pytest.raises(ArchitectureError, match=f"sets {KEY} to 3, but llama.cpp takes at most 2"):
        FAMILY.metadata({**CONFIG, KEY: 3})
    with pytest.raises(ArchitectureError, match=f"{KEY} of LlamaForCausalLM .* is 'one'"):
        FAMILY.metadata({**CONFIG, KEY: "one"})


def test_key_values_without_the_blocks() -> None:
    keys = {
        "x.block_count": u32(5), "x.nextn_predict_layers": u32(1), "general.block_count": u32(9),
        "x.attention.head_count_kv": array("i32", [4, 0, 4, 0, 4]),
        "x.rope.dimension_sections": array("i32", [1, 2, 3, 4, 5]),
        "x.other": array("i32", [1, 2, 3, 4]),
    }  # fmt: skip
    assert count_blocks("x", keys) == range(4, 5)
    found = drop_blocks("x", keys)
    assert found == {
        **{key: value for key, value in keys.items() if key != "x.nextn_predict_layers"},
        "x.block_count": u32(4),
        "x.attention.head_count_kv": array("i32", [4, 0, 4, 0]),
    }
    assert drop_blocks("x", found) == found
    assert count_blocks("x", found) == count_blocks("y", keys) == range(0)
    assert count_blocks("x", {**keys, "x.block_count": text("five")}) == range(0)
    assert count_blocks("x", {**keys, "x.nextn_predict_layers": u32(9)}) == range(5)


@pytest.mark.parametrize("name", WITH)
def test_logits_are_the_same_with_and_without_the_block(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    from support.llama_logits import llama_logits

    tokens = np.random.default_rng(0).integers(2, 4000, 32).tolist()
    files = [
        quantcli.quantize(
            checkpoint(name), tmp_path / f"{no_mtp}.gguf", type="Q8_0", no_mtp=no_mtp
        ).paths[0]
        for no_mtp in (False, True)
    ]
    kept, dropped = ({t.name: t for t in GGUFReader(file).tensors} for file in files)
    config = MODELS[name].config
    prefix = f"blk.{config.get('text_config', config)['num_hidden_layers']}."
    block = {name for name in kept if name.startswith(prefix)}
    assert kept.keys() - dropped.keys() == block
    ends = {f"{prefix}nextn.{part}.weight" for part in ("eh_proj", "enorm", "hnorm")}
    assert ends <= {name for name in block if ".nextn." in name}
    assert kept[f"{prefix}nextn.eh_proj.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    one, other = (llama_logits(file, tokens) for file in files)
    np.testing.assert_array_equal(one, other)


def test_a_gguf_loses_its_block_as_a_checkpoint_does(
    checkpoint: Callable[..., Path], gguf: Callable[..., Path], tmp_path: Path
) -> None:
    direct = quantcli.quantize(
        checkpoint("qwen35-mtp"), tmp_path / "a.gguf", type="F32", no_mtp=True
    )
    later = quantcli.quantize(
        gguf("qwen35-mtp", "F32"), tmp_path / "b.gguf", type="F32", no_mtp=True
    )
    one, other = (GGUFReader(done.paths[0]) for done in (direct, later))
    assert [t.name for t in one.tensors] == [t.name for t in other.tensors]
    for first, second in zip(one.tensors, other.tensors, strict=True):
        np.testing.assert_array_equal(first.data, second.data)
    keys = [
        {key: field.contents() for key, field in reader.fields.items() if key.startswith("qwen35.")}
        for reader in (one, other)
    ]
    assert keys[0] == keys[1]
    assert keys[0]["qwen35.attention.recurrent_layers"] == [True, False, True, True]


@pytest.mark.parametrize("to", ["hf", "compressed-tensors"])
def test_a_folder_copies_the_block_or_leaves_it_out(
    to: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from support.gguf_models import read_config, read_stored

    source = checkpoint("qwen35-vl")
    options: dict[str, Any] = {"type": "Q8_0"} if to == "hf" else {"bits": 8, "group_size": 32}
    kept = quantcli.quantize(source, tmp_path / "kept", to=to, **options)
    dropped = quantcli.quantize(source, tmp_path / "dropped", to=to, no_mtp=True, **options)
    wanted = {name for name in read_stored(source)[0] if name.startswith("mtp.")}
    assert wanted == set(MODELS["qwen35-vl"].beside)
    from safetensors.numpy import load_file

    original, first, second = (
        load_file(folder / "model.safetensors")
        for folder in (source, kept.paths[0], dropped.paths[0])
    )
    for name in wanted:
        np.testing.assert_array_equal(first[name], original[name])
        assert name not in second
    assert second.keys() == first.keys() - wanted
    assert any("multi-token prediction are copied" in note.message for note in kept.notes)
    assert not any("multi-token" in note.message for note in dropped.notes)
    keys = [read_config(done.paths[0])["text_config"] for done in (kept, dropped)]
    assert [key["mtp_num_hidden_layers"] for key in keys] == [1, 0]  # type: ignore[index]


def test_nothing_to_leave_out_is_said(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    done = quantcli.quantize(checkpoint("qwen35"), tmp_path / "a.gguf", type="Q4_0", no_mtp=True)
    assert any("--no-mtp has no effect" in note.message for note in done.notes)


def test_a_block_that_config_json_does_not_name(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """As the published Qwen3-Next."""
    import json
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(checkpoint("qwen3-next-mtp"), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["mtp_num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    file = quantcli.quantize(folder, tmp_path / "a.gguf", type="F32").paths[0]
    fields = GGUFReader(file).fields
    assert fields["qwen3next.nextn_predict_layers"].contents() == 1
    assert fields["qwen3next.block_count"].contents() == 5
    back = quantcli.export(file, tmp_path / "back", to="hf").paths[0]
    assert json.loads((back / "config.json").read_text())["mtp_num_hidden_layers"] == 1
    from safetensors.numpy import load_file

    one, other = (load_file(each / "model.safetensors") for each in (folder, back))
    assert one.keys() == other.keys()


def test_a_calibration_says_what_it_does_not_see(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    text = Path(__file__).parent.parent / "data" / "pride-and-prejudice.txt"
    done = quantcli.calibrate(
        checkpoint("qwen35-mtp"), data=[text], output=tmp_path / "m.gguf", ctx=32, chunks=2
    )
    said = [note.message for note in done.notes if "multi-token prediction" in note.message]
    assert said == [
        "nothing is known of the 8 matrices of multi-token prediction, because transformers does "
        "not run them"
    ]
    names = {tensor.name for tensor in GGUFReader(done.paths[0]).tensors}
    assert any(name.startswith("blk.3.ssm_out") for name in names)
    assert not any(name.startswith("blk.4.") for name in names)
