"""A model folder appears whole or not at all, and is the same however it was made."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.model_folders import CHECKPOINT, linear_names, make_folder
from support.tiny_models import build

import quantcli
from quantcli.artifacts.atomic_folder import MANIFEST, AtomicFolder
from quantcli.artifacts.write import ArtifactDone
from quantcli.errors import OutputError, WeightError
from quantcli.sources.shards import read_index
from quantcli.types import Note

FORMATS = ("compressed-tensors", "gptq", "gptq-v2", "awq", "mlx", "hf")


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("to", FORMATS)
def test_bytes_do_not_depend_on_threads_or_slabs(folder, tmp_path, monkeypatch, to):
    expected = folder(to)
    make_folder(CHECKPOINT, tmp_path / "one", to=to, threads=1)
    assert contents(tmp_path / "one") == contents(expected)
    # The digest is over slabs, so only the weights stay the same.
    monkeypatch.setattr("quantcli.artifacts.slabs.SLAB_BYTES", 40_000)
    make_folder(CHECKPOINT, tmp_path / "many", to=to, threads=5)
    weights = "model.safetensors"
    assert (tmp_path / "many" / weights).read_bytes() == (expected / weights).read_bytes()


@pytest.mark.parametrize("to", FORMATS)
def test_shards_hold_the_same_tensors(folder, tmp_path, to):
    make_folder(CHECKPOINT, tmp_path / "made", to=to, split_max_size="700K")
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    assert read_index(tmp_path / "made") == index["weight_map"]
    whole = load_file(folder(to) / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in whole.values())
    found = {}
    for shard in set(index["weight_map"].values()):
        with safe_open(tmp_path / "made" / shard, "np") as file:
            assert file.metadata() == {"format": "mlx" if to == "mlx" else "pt"}
            found |= dict.fromkeys(file.keys(), shard)
        for name, values in load_file(tmp_path / "made" / shard).items():
            assert values.tobytes() == whole[name].tobytes()
    assert found == index["weight_map"]
    assert len(set(found.values())) > 2


def test_the_manifest_says_how_it_was_made(tmp_path):
    *_, done = make_folder(CHECKPOINT, tmp_path / "made", to="gptq", bits=3, group_size=32)
    assert isinstance(done, ArtifactDone)
    manifest = json.loads((tmp_path / "made" / MANIFEST).read_text())
    assert manifest["schema"] == "quantcli.manifest/1"
    assert manifest["recipe"] == 'to = "gptq"\nbits = 3\ngroup_size = 32\n'
    assert manifest["source"] == {"digest": done.source_digest}
    assert done.source_digest != "sha256:" + "0" * 64
    assert done.nbytes == sum(p.stat().st_size for p in (tmp_path / "made").iterdir())
    # The source's digest is the source's: another grid has the same.
    *_, other = make_folder(CHECKPOINT, tmp_path / "other", to="gptq", bits=4)
    assert other.source_digest == done.source_digest


def test_the_python_call_makes_the_same(folder, tmp_path):
    done = quantcli.quantize(CHECKPOINT, tmp_path / "made", to="awq")
    assert done.paths == (tmp_path / "made",)
    assert contents(tmp_path / "made") == contents(folder("awq"))
    with pytest.raises(OutputError, match="exists already"):
        quantcli.quantize(CHECKPOINT, tmp_path / "made", to="awq")


def test_settings_are_copied_and_weights_of_other_kinds_are_not(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in CHECKPOINT.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "LICENSE").write_text("do as you like")
    (source / "quantize_config.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"weights")
    (source / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# Bookworm\n")
    make_folder(source, tmp_path / "made", to="awq")
    made = tmp_path / "made"
    for name in ("chat_template.jinja", "LICENSE", "tokenizer.json", "generation_config.json"):
        assert (made / name).read_bytes() == (source / name).read_bytes()
    assert not (made / "pytorch_model.bin").exists()
    assert not (made / "quantize_config.json").exists()
    card = (made / "README.md").read_text()
    assert card.startswith(
        "---\nlicense: mit\nlibrary_name: transformers\ntags:\n- quantcli\n- awq\n"
    )
    assert "bits per weight" in card


def test_eight_bit_floats_are_taken_and_warned_of(tmp_path, weights):
    source = tmp_path / "source"
    source.mkdir()
    for path in CHECKPOINT.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    stored = load_file(CHECKPOINT / "model.safetensors")
    for name in linear_names(stored):
        stored[name] = (weights[name] * 64).astype(ml_dtypes.float8_e4m3fn)
        stored[f"{name}_scale"] = np.full(1, 1 / 64, np.float32)
    save_file(stored, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (source / "config.json").write_text(json.dumps(config))
    events = make_folder(source, tmp_path / "made", to="gptq", keep=("o_proj",))
    said = [e.message for e in events if isinstance(e, Note) and e.level == "warning"]
    assert len(said) == 1
    assert "24 matrices are stored as F8_E4M3 and are rounded a second time" in said[0]
    made = load_file(tmp_path / "made" / "model.safetensors")
    name = "model.layers.2.self_attn.o_proj.weight"
    meant = stored[name].astype(np.float32) / 64
    assert np.array_equal(made[name], meant.astype(ml_dtypes.bfloat16))
    assert not any(key.endswith("weight_scale") for key in made)
    made_config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert made_config["quantization_config"]["quant_method"] == "gptq"
    make_folder(source, tmp_path / "plain", to="hf", type="F16")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert np.array_equal(plain[name], meant.astype(np.float16))
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "awq"])
def test_stacked_experts_become_what_split_ones_are(name, to, tmp_path):
    made = []
    for stored in (name, f"{name}-stacked"):
        source = build(stored, tmp_path / stored, dtype="bfloat16")
        make_folder(source, tmp_path / f"{stored}-made", to=to, group_size=32)
        made.append(load_file(tmp_path / f"{stored}-made" / "model.safetensors"))
    assert made[0].keys() == made[1].keys()
    assert all(np.array_equal(made[0][key], made[1][key]) for key in made[0])
    block = "block_sparse_moe.experts.3.w2" if name == "mixtral" else "mlp.experts.3.down_proj"
    packed = "weight_packed" if to == "compressed-tensors" else "qweight"
    assert f"model.layers.1.{block}.{packed}" in made[0]
    router = block.partition(".experts")[0] + ".gate"
    config = json.loads((tmp_path / f"{name}-made" / "config.json").read_text())
    assert f"model.layers.1.{router}" in json.dumps(config["quantization_config"]).replace("\\", "")


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("to", ["compressed-tensors", "mlx"])
def test_experts_may_be_kept_however_they_were_stored(name, to, tmp_path):
    part = {"mixtral": "w2", "qwen3-moe": "down_proj"}[name]
    pattern = rf"layers\.1.*experts\.[02]\.{part}" if to != "mlx" else r"layers\.1.*down_proj"
    made = []
    for stored in (name, f"{name}-stacked"):
        source = build(stored, tmp_path / stored, dtype="bfloat16")
        target = tmp_path / f"{stored}-made"
        make_folder(source, target, to=to, group_size=32, keep=(pattern,))
        made.append(load_file(target / "model.safetensors"))
    assert made[0].keys() == made[1].keys()
    assert [k for k in made[0] if made[0][k].tobytes() != made[1][k].tobytes()] == []
    original = load_file(tmp_path / name / "model.safetensors")
    experts = [
        next(v for k, v in original.items() if "layers.1" in k and f"experts.{e}.{part}" in k)
        for e in range(4)
    ]
    block = "block_sparse_moe" if name == "mixtral" else "mlp"
    if to == "mlx":
        kept = made[0][f"model.layers.1.{block}.switch_mlp.down_proj.weight"]
        assert kept.tobytes() == np.stack(experts).tobytes()
    else:
        # Servers run the experts of a layer in one kernel, so all of them are kept.
        prefix = f"model.layers.1.{block}.experts."
        packed = [k for k in made[0] if k.startswith(prefix) and k.endswith("_packed")]
        assert packed == []
        assert sum(k.startswith(prefix) for k in made[0]) == 12
        for e in range(4):
            assert made[0][f"{prefix}{e}.{part}.weight"].tobytes() == experts[e].tobytes()
        assert f"model.layers.0.{block}.experts.0.{part}.weight_packed" in made[0]


def test_a_broken_weight_leaves_nothing_behind(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in CHECKPOINT.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][700, 31] = np.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(WeightError) as refused:
        make_folder(source, tmp_path / "made", to="gptq")
    message = str(refused.value)
    assert "model.layers.2.mlp.up_proj.weight: the weight nan at row 700, column 31" in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_failure_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    target = tmp_path / "made"
    target.mkdir()
    (target / MANIFEST).write_bytes(b"old")
    with pytest.raises(type(error)), AtomicFolder(target, {"a": 3}, force=True) as files:
        files.write("a", 0, b"new")
        raise error
    assert (target / MANIFEST).read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_second_writer_is_refused_and_a_killed_one_is_taken_over(tmp_path):
    target = tmp_path / "made"
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from quantcli.artifacts.atomic_folder import AtomicFolder\n"
        "with AtomicFolder(Path(sys.argv[1]), {'a': 3, 'b': 3}) as files:\n"
        "    print('open', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(OutputError, match="another run"), AtomicFolder(target, {"a": 3}):
            pass
        os.kill(other.pid, signal.SIGKILL)
    time.sleep(0.05)
    assert [path.name for path in tmp_path.iterdir()] == [".made.partial"]
    with AtomicFolder(target, {"a": 3}) as files:
        files.write("a", 0, b"new")
        files.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in target.iterdir()] == ["a"]
