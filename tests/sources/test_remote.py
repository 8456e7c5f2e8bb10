"""Headers of the Hub's files by ranges: the same as of local files, and hardly a byte more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.broken import entry, safetensors
from support.fake_hub import COMMIT, Files, Hub, point_at, put_in_cache, serve

from quantcli.errors import SourceError
from quantcli.sources.gguf import open_gguf
from quantcli.sources.hf import HfCheckpoint, open_checkpoint, read_config
from quantcli.sources.remote import open_remote_gguf, open_remote_shards
from quantcli.sources.resolve import resolve
from quantcli.sources.shards import open_shards

constants = pytest.importorskip("huggingface_hub.constants")

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"
REPO, SHARDED, GGUF = "org/mini", "org/sharded", "org/gguf"
GPTQ, PACKED = "org/gptq", "org/packed"


def _sharded(folder: Path) -> Files:
    """Two shards; the first one's header is longer than the first request."""
    many = {f"tensor.{i:05d}.{'x' * 60}": entry([1], 4 * i, 4 * i + 4) for i in range(3000)}
    files = {
        "config.json": b"{}",
        "a.safetensors": safetensors(folder / "a", many, bytes(12000)).read_bytes(),
        "b.safetensors": safetensors(folder / "b", {"w": entry([2], 0, 8)}, bytes(8)).read_bytes(),
    }
    pairs = [*(f'"{name}": "a.safetensors"' for name in many), '"w": "b.safetensors"']
    index = '{"weight_map": {' + ", ".join(pairs) + "}}"
    return files | {"model.safetensors.index.json": index.encode()}


def _quantized(
    settings: dict[str, object], parts: dict[str, tuple[str, list[int], bytes]]
) -> Files:
    """A checkpoint of one matrix whose parts lie beyond the first request."""
    header, data = {"first": entry([1 << 17], 0, 1 << 19)}, bytes(1 << 19)
    for name, (dtype, shape, content) in parts.items():
        header[name] = entry(shape, len(data), len(data) + len(content), dtype)
        data += content
    raw = json.dumps(header).encode()
    return {
        "config.json": json.dumps({"quantization_config": settings}).encode(),
        "model.safetensors": len(raw).to_bytes(8, "little") + raw + data,
    }


def _gptq() -> Files:
    return _quantized(
        {"quant_method": "gptq", "bits": 4, "group_size": 64},
        {
            "m.qweight": ("I32", [32, 64], bytes(8192)),
            "m.qzeros": ("I32", [4, 8], bytes(128)),
            "m.scales": ("F16", [4, 64], bytes(512)),
            "m.g_idx": ("I32", [256], np.repeat(np.arange(4, dtype=np.int32), 64).tobytes()),
        },
    )


def _packed() -> Files:
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 3, "group_size": 40}}
    return _quantized(
        {"quant_method": "compressed-tensors", "config_groups": {"g": scheme}},
        {
            "m.weight_packed": ("I32", [64, 19], bytes(64 * 76)),
            "m.weight_scale": ("F16", [64, 5], bytes(640)),
            "m.weight_shape": ("I64", [2], np.array([64, 200]).tobytes()),
        },
    )


def _model(folder: Path) -> bytes:
    """A GGUF whose vocabulary is larger than the first request, and its data larger still."""
    path = folder / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token number {number}" for number in range(20000)])
    writer.add_tensor("token_embd.weight", np.ones((2000, 512), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    repos: dict[str, Files | str] = {
        REPO: {path.name: path.read_bytes() for path in MINI.iterdir()},
        SHARDED: _sharded(tmp_path),
        GGUF: {"m.gguf": _model(tmp_path)},
        GPTQ: _gptq(),
        PACKED: _packed(),
        "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"no"},
    }
    with serve(repos) as running:
        point_at(running, monkeypatch)
        yield running


def _transferred(hub: Hub) -> int:
    return sum(int(line.rsplit(" ", 1)[1]) for line in hub.asked if line.startswith("PART"))


def test_a_checkpoint_is_listed_without_its_weights(hub):
    found = resolve(REPO, weights=False)
    assert (found.kind, found.is_remote, found.revision) == ("checkpoint", True, COMMIT)
    assert not (found.path / "model.safetensors").exists()
    assert (found.path / "tokenizer.json").exists()
    remote, local = open_remote_shards(found.path, found.remote), open_shards(MINI)
    assert {n: (t.shape, t.dtype, t.nbytes) for n, t in remote.tensors.items()} == {
        n: (t.shape, t.dtype, t.nbytes) for n, t in local.tensors.items()
    }
    assert [file.size for file in remote.files] == [file.size for file in local.files]
    assert "model.safetensors" not in hub.downloaded()
    assert _transferred(hub) == 1 << 18
    local.close()


@pytest.mark.parametrize("repo", [GPTQ, PACKED])
def test_a_quantized_checkpoint_is_told_from_its_header(repo, hub, tmp_path):
    for name, content in hub.repos[repo].items():
        (tmp_path / name).write_bytes(content)
    found = resolve(repo, weights=False)
    shards = open_remote_shards(found.path, found.remote)
    remote = HfCheckpoint(found.path, read_config(found.path), shards)
    local = open_checkpoint(tmp_path)
    assert {n: (t.shape, t.dtype, t.nbytes) for n, t in remote.tensors.items()} == {
        n: (t.shape, t.dtype, t.nbytes) for n, t in local.tensors.items()
    }
    assert set(local.tensors) == {"first", "m.weight"}
    assert len([line for line in hub.asked if line.startswith("PART")]) == 1
    local.close()


def test_rows_can_be_read_one_by_one(hub):
    found = resolve(REPO, weights=False)
    remote, local = open_remote_shards(found.path, found.remote), open_shards(MINI)
    name = "model.layers.3.mlp.up_proj.weight"
    rows = [
        shards.places[name].file.read_block(
            shards.places[name].offset, np.dtype(np.uint16), 256, (700, 702)
        )
        for shards in (remote, local)
    ]
    assert (rows[0] == rows[1]).all()
    local.close()


def test_a_long_header_takes_a_second_request(hub):
    found = resolve(SHARDED, weights=False)
    shards = open_remote_shards(found.path, found.remote)
    assert len(shards.tensors) == 3001
    # On a busy machine one may be asked for again.
    requests = {line for line in hub.asked if line.startswith("PART")}
    assert len(requests) == 3


def test_a_gguf_is_listed_without_its_weights(hub, tmp_path):
    found = resolve(f"hf://{GGUF}/m.gguf", weights=False)
    assert (found.kind, found.is_remote) == ("gguf", True)
    remote = open_remote_gguf(found.path, found.remote)
    with_local = open_gguf(tmp_path / "m.gguf")
    assert remote.metadata == with_local.metadata
    assert set(remote.tensors) == set(with_local.tensors)
    assert list(remote.file_sizes.values()) == list(with_local.file_sizes.values())
    assert _transferred(hub) < with_local.path.stat().st_size / 4
    with_local.close()


def test_what_is_in_the_cache_is_not_asked_for(hub):
    whole = resolve(REPO)
    asked = len(hub.asked)
    assert resolve(REPO, weights=False) == whole
    assert not whole.is_remote
    assert len(hub.asked) == asked


def test_a_cache_that_holds_some_settings_is_completed(hub, tmp_path):
    put_in_cache(tmp_path / "cache", SHARDED, {"config.json": b"{}"})
    found = resolve(SHARDED, weights=False)
    assert len(open_remote_shards(found.path, found.remote).tensors) == 3001


def test_settings_alone_are_no_whole_model(hub):
    resolve(REPO, weights=False)
    assert (resolve(REPO).path / "model.safetensors").exists()


def test_importance_matrices_are_fetched_whole(hub):
    hub.repos[GGUF] = {"imatrix.gguf": b"GGUF" + bytes(60)}
    with pytest.raises(SourceError, match="version 0"):
        resolve(f"hf://{GGUF}/imatrix.gguf", weights=False)
    assert hub.downloaded() == {"imatrix.gguf"}


def test_a_broken_header_is_the_same_error_as_of_a_local_file(hub):
    hub.repos[REPO]["model.safetensors"] = b"\xff" * 100
    found = resolve(REPO, weights=False)
    with pytest.raises(SourceError, match=r"model\.safetensors: declares a header of"):
        open_remote_shards(found.path, found.remote)


def test_a_repository_without_weights_says_what_to_do(hub):
    found = resolve("org/pickled", weights=False)
    with pytest.raises(SourceError, match=r"org/pickled@\w+: the repository holds no model") as e:
        open_remote_shards(found.path, found.remote)
    assert "spaces/safetensors/convert" in e.value.hint


def test_a_file_that_is_not_there(hub):
    with pytest.raises(SourceError, match=r"the repository holds no file absent\.gguf"):
        resolve(f"hf://{GGUF}/absent.gguf", weights=False)


def test_a_server_that_sends_no_parts_is_refused(hub):
    hub.sends_parts = False
    found = resolve(f"hf://{GGUF}/m.gguf", weights=False)
    with pytest.raises(SourceError, match=r"does not send m\.gguf in parts"):
        open_remote_gguf(found.path, found.remote)


def test_the_hub_out_of_reach(hub, monkeypatch):
    found = resolve(REPO, weights=False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match="the Hub cannot be reached"):
        open_remote_shards(found.path, found.remote)
