"""Where a target leads: local paths, the Hub's cache, a download, and every way to miss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.broken import Gguf, entry, legacy, legacy_entry, pair, safetensors, string
from support.fake_hub import COMMIT, Files, Hub, point_at, put_in_cache, serve

from quantcli.errors import SourceError
from quantcli.sources.resolve import Resolved, resolve
from quantcli.types import Event, Note, Progress

constants = pytest.importorskip("huggingface_hub.constants")

REPO = "some-org/Tiny-1B"


def model_files(folder: Path) -> Files:
    """A repository with everything that is needed, and much that is not."""
    weights = safetensors(folder / "w", {"a": entry([64], 0, 256)}, bytes(256)).read_bytes()
    return {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": weights,
        "tokenizer.json": b"{}",
        "tokenizer.model": b"sp",
        "chat_template.jinja": b"{{ 1 }}",
        "README.md": b"# Tiny",
        "pytorch_model.bin": b"no",
        "consolidated.safetensors": b"no",
        "original/consolidated.safetensors": b"no",
        "onnx/config.json": b"no",
        "picture.png": b"no",
    }


NEEDED = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
    "README.md",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, with the Hub forbidden."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    # Away from the repository, whose folders would be taken for targets.
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that answers, and an empty cache."""
    shard = "model-{:05d}-of-00002.gguf"
    repos: dict[str, Files | str] = {
        REPO: model_files(tmp_path),
        "some-org/gated": "gated",
        "some-org/down": "broken",
        "some-org/ggufs": {
            "m-Q4_K_M.gguf": Gguf().write(tmp_path / "g").read_bytes(),
            "config.json": b"{}",
            "parts/" + shard.format(1): Gguf().write(tmp_path / "g").read_bytes(),
            "parts/" + shard.format(2): b"second",
        },
        "some-org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"no"},
        "some-org/dataset": {"data.parquet": b"no"},
    }
    with serve(repos) as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        point_at(running, monkeypatch)
        yield running


def refusal(target: str) -> str:
    with pytest.raises(SourceError) as caught:
        resolve(target)
    said = str(caught.value)
    assert "\n" not in said
    assert "Traceback" not in said
    return said


# ---- on this machine


def test_folder(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert resolve(str(folder)) == Resolved(folder, "checkpoint")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model").path == tmp_path / "model"


def test_kind_is_told_by_content(tmp_path: Path) -> None:
    general = pair("general.type", 8, string(b"imatrix"))
    Gguf().write(tmp_path / "a.bin")
    Gguf(pairs=(general,)).write(tmp_path / "b.gguf")
    (tmp_path / "c.gguf").write_bytes(legacy(legacy_entry(b"a.weight", [1.0])))
    kinds = [resolve(str(tmp_path / name)).kind for name in ("a.bin", "b.gguf", "c.gguf")]
    assert kinds == ["gguf", "imatrix", "imatrix"]


def test_local_folder_wins(cache: Path, tmp_path: Path) -> None:
    put_in_cache(cache, REPO, model_files(tmp_path))
    local = tmp_path / REPO
    local.mkdir(parents=True)
    assert resolve(REPO) == Resolved(Path(REPO), "checkpoint")
    assert resolve(f"hf://{REPO}").repo == REPO


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("modle", "modle: there is no such file or folder (did you mean model?)"),
        ("./modle", "did you mean model?"),
        ("model/m.ggfu", "did you mean model/m.gguf?"),
        ("nothing-like-it", "a model is a folder, a .gguf file, org/name[@revision]"),
        ("a/b/c", "there is no such file or folder"),
        ("/absent/model", "there is no such file or folder"),
        ("absent/model.gguf", "there is no such file or folder"),
        ("model/zzzz", "for the Hub's repository: hf://model/zzzz"),
        ("https://huggingface.co/a/b", "for a repository of the Hub, write org/name"),
    ],
)
def test_missing_paths_never_reach_the_hub(
    target: str, sentence: str, hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    Gguf().write(tmp_path / "model" / "m.gguf")
    said = refusal(target)
    assert sentence in said
    assert said.startswith(f"{target}: there is no such file or folder")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model.safetensors", "is one file of a checkpoint (name its folder:"),
        ("notes.txt", "is neither a GGUF file nor an importance matrix"),
    ],
)
def test_other_files(name: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"some text or other")
    assert sentence in refusal(str(tmp_path / name))


@pytest.mark.parametrize("target", ["hf://", "hf://gpt2", "hf://a b/c", "hf://a/b@", "hf:///a/b"])
def test_addresses_that_are_none(target: str) -> None:
    assert "is not a repository's address" in refusal(target)


@pytest.mark.parametrize("name", ["model.safetensors", "../m.gguf", "a/../../m.gguf"])
def test_files_that_are_not_fetched(name: str, hub: Hub) -> None:
    assert "of single files only GGUF and importance matrices" in refusal(f"hf://{REPO}/{name}")
    assert hub.asked == []


# ---- in the cache


@pytest.mark.parametrize(
    "target", [REPO, f"{REPO}@main", f"hf://{REPO}", f"hf://{REPO}@main", f"{REPO}@{COMMIT}"]
)
def test_cached_repository(target: str, cache: Path, tmp_path: Path) -> None:
    snapshot = put_in_cache(cache, REPO, model_files(tmp_path))
    assert resolve(target) == Resolved(snapshot, "checkpoint", REPO, COMMIT)


def test_cached_repository_is_not_asked_for(cache: Path, hub: Hub, tmp_path: Path) -> None:
    put_in_cache(cache, REPO, model_files(tmp_path))
    resolve(REPO)
    assert hub.asked == []


def test_snapshot_named_as_a_path(cache: Path, tmp_path: Path) -> None:
    """The repository and the commit are read from where the folder lies."""
    snapshot = put_in_cache(cache, REPO, model_files(tmp_path) | {"m.gguf": Gguf().head()})
    assert resolve(str(snapshot)) == Resolved(snapshot, "checkpoint", REPO, COMMIT)
    Gguf().write(tmp_path / "m.gguf")
    assert resolve(str(tmp_path / "m.gguf")).repo is None


def test_cached_file(cache: Path, tmp_path: Path) -> None:
    content = Gguf().write(tmp_path / "g").read_bytes()
    snapshot = put_in_cache(cache, REPO, {"q/m.gguf": content})
    found = resolve(f"hf://{REPO}/q/m.gguf")
    assert found == Resolved(snapshot / "q" / "m.gguf", "gguf", REPO, COMMIT)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_partly_cached_offline(missing: str, cache: Path, tmp_path: Path) -> None:
    files = model_files(tmp_path)
    del files[missing]
    put_in_cache(cache, REPO, files)
    assert "(completely) in the local cache, and HF_HUB_OFFLINE forbids" in refusal(REPO)


def test_offline(cache: Path) -> None:
    said = refusal(f"{REPO}@v2")
    assert said.startswith(f"{REPO}@v2: is not (completely) in the local cache, and HF_HUB_OFFLINE")


def test_environment_is_honoured(tmp_path: Path) -> None:
    """HF_HOME and HF_HUB_OFFLINE as a user sets them, in a process of its own."""
    put_in_cache(tmp_path / "home" / "hub", REPO, model_files(tmp_path))
    program = (
        "import sys\n"
        "from quantcli.sources.resolve import resolve\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "print(resolve(sys.argv[1]).revision)\n"
        "try: resolve('other/repo')\n"
        "except Exception as error: print(error)\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", program, REPO],
        env=kept | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    commit, refused = done.stdout.splitlines()
    assert commit == COMMIT
    assert "HF_HUB_OFFLINE forbids" in refused
    assert done.stderr == ""


# ---- from the Hub


def test_download_takes_what_is_needed(
    hub: Hub, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    found = resolve(REPO, on_progress=events.append)
    assert found == Resolved(found.path, "checkpoint", REPO, COMMIT)
    assert hub.downloaded() == NEEDED
    assert {str(p.relative_to(found.path)) for p in found.path.rglob("*")} == NEEDED
    assert isinstance(events[0], Note)
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in progress] == sorted({event.done for event in progress})
    assert all(0 < event.done <= event.total and event.what == REPO for event in progress)
    assert progress[-1].done == sum((found.path / name).stat().st_size for name in NEEDED)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    asked = len(hub.asked)
    assert resolve(REPO) == found
    assert len(hub.asked) == asked


def test_partly_cached_is_completed(hub: Hub, cache: Path, tmp_path: Path) -> None:
    put_in_cache(cache, REPO, {"config.json": model_files(tmp_path)["config.json"]})
    found = resolve(REPO)
    assert (found.path / "model.safetensors").stat().st_size > 256


def test_index_decides_what_is_whole(hub: Hub, cache: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    files = model_files(tmp_path)
    shards: Files = {
        "config.json": files["config.json"],
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00001.safetensors": files["model.safetensors"],
    }
    hub.repos["some-org/sharded"] = shards
    cached = {k: v for k, v in shards.items() if "00001" not in k}
    put_in_cache(cache, "some-org/sharded", cached)
    found = resolve("some-org/sharded")
    assert (found.path / "model-00001-of-00001.safetensors").exists()
    del shards["model-00001-of-00001.safetensors"]
    hub.repos["some-org/torn"] = shards
    assert "lacks model-00001-of-00001.safetensors, which its index names" in refusal(
        "some-org/torn"
    )


def test_one_file(hub: Hub) -> None:
    found = resolve("hf://some-org/ggufs@main/m-Q4_K_M.gguf")
    assert (found.kind, found.path.name, found.revision) == ("gguf", "m-Q4_K_M.gguf", COMMIT)
    assert hub.downloaded() == {"m-Q4_K_M.gguf"}


def test_all_shards_of_a_file(hub: Hub) -> None:
    found = resolve("hf://some-org/ggufs/parts/model-00001-of-00002.gguf")
    assert found.path.name == "model-00001-of-00002.gguf"
    assert hub.downloaded() == {"model-00001-of-00002.gguf", "model-00002-of-00002.gguf"}


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("some-org/absent", "some-org/absent: the Hub has no such repository, or it is private"),
        ("some-org/gated", "accept its terms at https://huggingface.co/some-org/gated"),
        ("some-org/down", "some-org/down: "),
        (f"{REPO}@v9", f"{REPO}@v9: the repository has no revision 'v9'"),
        (f"hf://{REPO}@refs/pr/7", "the repository has no revision 'refs/pr/7'"),
        (f"hf://{REPO}/absent.gguf", "the repository holds no file absent.gguf"),
        ("some-org/ggufs", "name one: hf://some-org/ggufs/m-Q4_K_M.gguf"),
        ("some-org/pickled", "convert them at https://huggingface.co/spaces/safetensors/convert"),
        ("some-org/dataset", "holds no config.json, so it is not a checkpoint"),
        ("some-org/bad--name", "is not a repository's name"),
    ],
)
def test_refusals_of_the_hub(target: str, sentence: str, hub: Hub) -> None:
    assert sentence in refusal(target)


@pytest.mark.parametrize("partly", [False, True])
def test_hub_out_of_reach(
    partly: bool, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    if partly:
        put_in_cache(cache, REPO, {"config.json": b"{}"})
    said = refusal(REPO)
    assert "is not (completely) in the local cache, and the Hub cannot be reached" in said


def test_cache_that_cannot_be_written(hub: Hub, cache: Path) -> None:
    cache.write_text("a file where the folder belongs")
    assert "cannot be stored in the local cache: [Errno 20]" in refusal(REPO)
