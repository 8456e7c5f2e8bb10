"""Uploads to a Hub of our own: what arrives, what is sent twice, and what is said."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.fake_hub import COMMIT, Hub, serve

from quantcli.cli.app import run as run_here

# The library's own, of how it passes a file to its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")

TOKEN = "hf_abcdefghijklmnop"
REPO = "org/small"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve({}) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "set"
    (made / "sub").mkdir(parents=True)
    (made / "README.md").write_text("# A card\n")
    (made / "large.bin").write_bytes(bytes(range(256)) * 100)
    (made / "sub" / "other.bin").write_bytes(b"other" * 2000)
    (made / ".unfinished.partial").mkdir()
    (made / ".unfinished.partial" / "data").write_bytes(b"x" * 9000)
    return made


def push(*names: object, code: int = 0) -> object:
    done = run_here(["export", *map(str, names), "--to", "hub", "--repo", REPO])
    assert done == code
    return done


def test_a_folder_arrives_whole_in_a_private_repository(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(folder)
    sent = hub.repos[REPO]
    assert isinstance(sent, dict)
    assert sent == {
        "README.md": (folder / "README.md").read_bytes(),
        "large.bin": (folder / "large.bin").read_bytes(),
        "sub/other.bin": (folder / "sub" / "other.bin").read_bytes(),
    }
    assert hub.created == {REPO: True}
    # One commit, and it comes last.
    assert hub.asked[-1] == f"POST /api/models/{REPO}/commit/main"
    assert sum("/commit/" in line for line in hub.asked) == 1
    out, err = capsys.readouterr()
    assert out.strip() == f"{hub.url}/{REPO}"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in out + err


def test_what_was_sent_is_not_sent_again(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.breaks_at = hashlib.sha256((folder / "sub" / "other.bin").read_bytes()).hexdigest()
    push(folder, code=1)
    assert hub.repos[REPO] == {}, "nothing is visible before all is there"
    assert "run it again" in capsys.readouterr().err or hub.asked
    hub.breaks_at = None
    push(folder)
    assert sum(line.startswith("PUT") for line in hub.asked) == 2
    assert set(hub.repos[REPO]) == {"README.md", "large.bin", "sub/other.bin"}
    assert list(hub.created) == [REPO]


def test_public_and_a_repository_that_is_there(hub: Hub, folder: Path) -> None:
    assert run_here(["export", str(folder), "--to", "hub", "--repo", REPO, "--public"]) == 0
    assert hub.created == {REPO: False}
    (folder / "README.md").write_text("# Another card\n")
    push(folder / "README.md")
    sent = hub.repos[REPO]
    assert isinstance(sent, dict)
    assert sent["README.md"] == b"# Another card\n"
    assert "large.bin" in sent


def test_a_dry_run_asks_nobody(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(["export", str(folder), "--to", "hub", "--repo", REPO, "--dry-run"]) == 0
    assert hub.asked == []
    out = capsys.readouterr().out
    assert "sub/other.bin" in out
    assert "unfinished" not in out
    assert COMMIT not in out


def test_refusals_are_one_sentence(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "again").mkdir()
    (folder / "again" / "README.md").write_text("another")
    push(folder, folder / "again", code=2)
    assert "would both be README.md" in capsys.readouterr().err
    push(folder / "nothing", code=1)
    assert "no such file or folder" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "none"))
    push(folder / "README.md", code=1)
    err = capsys.readouterr().err
    assert "does not let this account write" in err
    assert "hf auth login" in err
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    push(folder / "README.md", code=1)
    assert "cannot be reached" in capsys.readouterr().err


def test_quantize_pushes_what_it_made(
    hub: Hub, mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "made"
    command = ["quantize", str(mini), "--type", "Q4_K_M,Q8_0", "-o", f"{output}/", "--push", REPO]
    assert run_here(command) == 0
    sent = hub.repos[REPO]
    assert isinstance(sent, dict)
    assert sent == {path.name: path.read_bytes() for path in output.iterdir()}
    assert len(sent) == 2
    assert f"uploaded to {hub.url}/{REPO}" in capsys.readouterr().err


def test_a_push_is_refused_before_the_work(
    hub: Hub, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "q.gguf"
    command = ["quantize", str(mini), "--bits", "4", "-o", str(output)]
    assert run_here([*command, "--push", "no/such/name"]) == 2
    assert run_here([*command, "--public"]) == 2
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert run_here([*command, "--push", REPO]) == 1
    assert not output.exists()
