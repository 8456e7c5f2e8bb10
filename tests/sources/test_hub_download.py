"""Downloads into the Hub's cache: resumed at the byte, checked, and stopped at once."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_hub import COMMIT, Hub, point_at, serve
from support.process import command, environment

from quantcli.errors import SourceError
from quantcli.sources import hub_download
from quantcli.sources.resolve import resolve

constants = pytest.importorskip("huggingface_hub.constants")

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"
REPO = "org/mini"
WEIGHTS = (MINI / "model.safetensors").read_bytes()
TAG = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    with serve({REPO: {path.name: path.read_bytes() for path in MINI.iterdir()}}) as running:
        point_at(running, monkeypatch)
        yield running


def _blobs(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--org--mini" / "blobs"


def _begin(hub: Hub, tmp_path: Path) -> subprocess.Popen[str]:
    """A download whose server has sent half of the weights and then nothing more."""
    hub.stalls = "model.safetensors"
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen(
        [*command(), "-q", "quantize", REPO, "--type", "Q8_0", "--download", "-o", "m.gguf"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**env),
        cwd=tmp_path,
    )  # fmt: skip
    partial, deadline = _blobs(tmp_path) / f"{TAG}.quantcli", time.monotonic() + 60
    while not partial.exists() or partial.stat().st_size < len(WEIGHTS) // 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_download_goes_on_at_the_byte(number, hub, tmp_path):
    process = _begin(hub, tmp_path)
    begun = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - begun < 3
    if number == signal.SIGINT:
        assert (process.returncode, said) == (130, "error: interrupted\n")
    hub.released.set()
    hub.stalls = None
    there = (_blobs(tmp_path) / f"{TAG}.quantcli").stat().st_size
    assert there >= len(WEIGHTS) // 3
    hub.asked.clear()
    folder = resolve(REPO).path
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    parts = [line.split() for line in hub.asked if line.startswith("PART")]
    assert parts == [["PART", "/files/model.safetensors", str(len(WEIGHTS) - there)]]
    assert not list(_blobs(tmp_path).glob("*.quantcli"))


def test_the_library_finds_what_was_downloaded(hub, tmp_path):
    from huggingface_hub import hf_hub_download, snapshot_download

    folder = resolve(REPO).path
    asked = len(hub.asked)
    assert Path(snapshot_download(REPO, local_files_only=True)) == folder
    found = hf_hub_download(REPO, "model.safetensors", local_files_only=True)
    assert Path(found).read_bytes() == WEIGHTS
    assert Path(found).resolve().name == TAG
    assert len(hub.asked) == asked
    assert folder.name == COMMIT
    assert (folder.parents[1] / "refs" / "main").read_text() == COMMIT


def test_the_library_goes_on_with_what_lies_there(hub, tmp_path):
    """A file that it downloaded is not asked for again, nor the other way round."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, "model.safetensors")
    hub.asked.clear()
    resolve(REPO)
    assert "model.safetensors" not in hub.downloaded()
    assert not [line for line in hub.asked if line.startswith("PART")]


def test_failing_answers_and_broken_connections(hub):
    hub.failing, hub.dropping = 0.3, 0.4
    folder = resolve(REPO).path
    for path in MINI.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_server_without_ranges_sends_the_whole_again(hub, tmp_path):
    hub.sends_parts = False
    _blobs(tmp_path).mkdir(parents=True)
    (_blobs(tmp_path) / f"{TAG}.quantcli").write_bytes(WEIGHTS[:1234567])
    assert (resolve(REPO).path / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_contents_are_held_against_the_listed_digest(name, hub, tmp_path):
    """Of large files SHA-256, of small ones Git's SHA-1; what was wrong does not stay."""
    content = (MINI / name).read_bytes()
    small = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    _blobs(tmp_path).mkdir(parents=True)
    tag = TAG if name == "model.safetensors" else small
    (_blobs(tmp_path) / f"{tag}.quantcli").write_bytes(b"other bytes")
    with pytest.raises(SourceError, match=rf"org/mini: {name} is not what the Hub lists"):
        resolve(REPO)
    assert (resolve(REPO).path / name).read_bytes() == content


def test_a_download_that_another_run_does_is_not_disturbed(hub, tmp_path):
    _blobs(tmp_path).mkdir(parents=True)
    with hub_download._owned(_blobs(tmp_path), TAG) as theirs:
        theirs.write_bytes(b"theirs")
        assert (resolve(REPO).path / "model.safetensors").read_bytes() == WEIGHTS
        assert theirs.read_bytes() == b"theirs"


def test_names_that_lead_out_of_the_folder_are_left_alone(hub, tmp_path):
    hub.repos[REPO]["../../../evil.json"] = b"{}"
    hub.repos[REPO]["/evil.json"] = b"{}"
    resolve(REPO)
    assert not list(tmp_path.rglob("evil.json"))


@pytest.mark.parametrize("place", ["blobId", "sha"])
def test_digests_that_lead_out_of_the_folder_are_refused(place, hub, tmp_path, monkeypatch):
    listed = hub_download.find_facts

    def lie(*args: object, **named: object) -> object:
        facts = listed(*args, **named)
        if place == "sha":
            facts.sha = "../../../evil"
        else:
            facts.siblings[0].blob_id, facts.siblings[0].lfs = "../../../evil", None
        return facts

    monkeypatch.setattr(hub_download, "find_facts", lie)
    with pytest.raises(SourceError, match="is no digest"):
        resolve(REPO)
    assert not list(tmp_path.rglob("evil*"))


def test_progress_is_told_once_and_in_order(hub):
    from quantcli.types import Progress

    told: list[int] = []
    lock = threading.Lock()

    def hear(event: object) -> None:
        with lock:
            if isinstance(event, Progress):
                told.append(event.done)

    resolve(REPO, on_progress=hear)
    assert told == sorted(set(told))
    assert told[-1] == sum(path.stat().st_size for path in MINI.iterdir() if path.name != "LICENSE")
