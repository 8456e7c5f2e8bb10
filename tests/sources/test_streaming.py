"""Models read where they are: every byte as of a local file, whatever the network does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.fake_hub import COMMIT, Files, Hub, point_at, put_in_cache, serve

import quantcli
from quantcli.errors import SourceError
from quantcli.model import open_model
from quantcli.sources import patience
from quantcli.sources.imatrix import read_importance
from quantcli.sources.patience import PassingError, Patience, read_retry_after
from quantcli.types import row_count

constants = pytest.importorskip("huggingface_hub.constants")

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"
REPO, TOKEN = "org/mini", "hf_abcdefghijklmnop"


def _files() -> Files:
    return {path.name: path.read_bytes() for path in MINI.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    with serve({REPO: _files()}) as running:
        point_at(running, monkeypatch)
        yield running


def _same_rows(target: str) -> int:
    """Compares every stored row with the local file's; returns the bytes."""
    total = 0
    with open_model(target) as remote, open_model(MINI) as local:
        assert remote.is_remote
        assert not local.is_remote
        assert set(remote.store.tensors) == set(local.store.tensors)
        for name, info in local.store.tensors.items():
            rows = row_count(info.shape)
            ours = remote.store.read_rows(name, 0, rows)
            theirs = local.store.read_rows(name, 0, rows)
            assert ours.tobytes() == theirs.tobytes()
            total += ours.nbytes
    return total


def test_every_row_is_that_of_the_file_and_the_weights_are_not_stored(hub, tmp_path):
    assert _same_rows(f"hf://{REPO}") > 1 << 20
    assert "model.safetensors" not in hub.downloaded()
    assert not list((tmp_path / "cache").rglob("model.safetensors"))


def test_answers_that_fail_and_connections_that_break(hub):
    hub.failing, hub.dropping = 0.3, 0.2
    _same_rows(REPO)
    assert {"503", "DROP", "BREAK"} <= set(hub.asked)


def test_bytes_that_have_come_are_not_asked_for_again(hub):
    """Each break leaves half of what was asked for, so that little is sent twice."""
    content = hub.repos[REPO]["model.safetensors"]
    with open_model(REPO) as model:
        hub.dropping = 1.0
        hub.chance.seed(3)
        name = max(model.store.tensors, key=lambda each: model.store.tensors[each].nbytes)
        info = model.store.tensors[name]
        hub.sent = 0
        rows = model.store.read_rows(name, 0, row_count(info.shape))
    assert "BREAK" in hub.asked
    assert content.find(rows.tobytes()) > 0
    assert hub.sent <= info.nbytes + (1 << 16)


def test_the_store_is_asked_without_the_token_and_the_hub_only_once(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.store = hub.url.replace("127.0.0.1", "localhost")
    _same_rows(REPO)
    assert hub.asked.count(f"GET /{REPO}/resolve/{COMMIT}/model.safetensors") == 1
    assert len(hub.at_store) > 10
    assert set(hub.at_store) == {""}


def test_a_signed_address_that_expires_is_asked_for_again(hub):
    hub.store = hub.url.replace("127.0.0.1", "localhost")
    with open_model(REPO) as remote, open_model(MINI) as local:
        name = "model.layers.2.mlp.up_proj.weight"
        hub.signature = "second"
        ours = remote.store.read_rows(name, 3, 40)
        assert ours.tobytes() == local.store.read_rows(name, 3, 40).tobytes()


@pytest.mark.parametrize("longer", [True, False])
def test_a_file_that_changes_while_it_is_read(hub, longer):
    files = hub.repos[REPO]
    with open_model(REPO) as model:
        name = "model.layers.2.mlp.up_proj.weight"
        model.store.read_rows(name, 0, 8)
        content = files["model.safetensors"]
        files["model.safetensors"] = content + b"x" if longer else content[:-1] + b"x"
        with pytest.raises(SourceError, match=r"hf://org/mini@\w+/model\.safetensors: has changed"):
            model.store.read_rows(name, 300, 308)


def test_a_commit_that_goes_away_while_it_is_read(hub):
    with open_model(REPO) as model:
        del hub.repos[REPO]["model.safetensors"]
        with pytest.raises(SourceError, match="history was rewritten"):
            model.store.read_rows("model.layers.2.mlp.up_proj.weight", 300, 308)


@pytest.mark.parametrize("options", [{"type": "Q4_K_M"}, {"to": "gptq"}])
def test_a_quantization_has_the_bytes_of_one_from_the_cache(options, hub, tmp_path, monkeypatch):
    """The same repository and commit are recorded for both."""
    hub.failing, hub.dropping = 0.1, 0.1
    streamed = quantcli.quantize(REPO, tmp_path / "streamed", **options)
    put_in_cache(tmp_path / "other", REPO, _files())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other"))
    before = len(hub.asked)
    cached = quantcli.quantize(REPO, tmp_path / "cached", **options)
    assert len(hub.asked) == before
    ours, theirs = streamed.paths[0], cached.paths[0]
    names = [each.name for each in ours.iterdir()] if ours.is_dir() else [""]
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_a_dry_run_reads_headers_alone(hub):
    result = quantcli.quantize(REPO, type="Q4_K_M", dry_run=True)
    assert result.nbytes > 1 << 20
    parts = [int(line.rsplit(" ", 1)[1]) for line in hub.asked if line.startswith("PART")]
    assert sum(parts) <= 1 << 18
    assert "model.safetensors" not in hub.downloaded()


def test_download_stores_the_weights(hub, tmp_path):
    done = quantcli.quantize(REPO, tmp_path / "m.gguf", type="Q8_0", download=True)
    assert done.paths[0].exists()
    assert list((tmp_path / "cache").rglob("model.safetensors"))
    assert not [line for line in hub.asked if line.startswith("PART")]


def test_a_gguf_is_exported_from_where_it_is(hub, tmp_path, mini):
    local = quantcli.quantize(mini, tmp_path / "m.gguf", type="Q4_0").paths[0]
    hub.repos["org/ggufs"] = {"q/m.gguf": local.read_bytes()}
    made = quantcli.export("hf://org/ggufs/q/m.gguf", tmp_path / "f.gguf", to="gguf", dtype="f16")
    again = quantcli.export(local, tmp_path / "g.gguf", to="gguf", dtype="f16")
    assert made.nbytes == pytest.approx(again.nbytes, abs=4096)
    assert "m.gguf" not in hub.downloaded()
    with open_model(made.paths[0]) as ours, open_model(again.paths[0]) as theirs:
        for one, other in zip(ours.tensors, theirs.tensors, strict=True):
            rows = [m.read_rows(t, 0, t.rows) for m, t in ((ours, one), (theirs, other))]
            assert (rows[0] == rows[1]).all()


def test_a_split_gguf_is_read_from_where_it_is(hub, tmp_path, mini):
    made = quantcli.quantize(mini, tmp_path / "m.gguf", type="Q8_0", split_max_size="2M")
    assert len(made.paths) > 1
    hub.repos["org/ggufs"] = {f"q/{path.name}": path.read_bytes() for path in made.paths}
    hub.failing, hub.dropping = 0.2, 0.1
    with (
        open_model(f"hf://org/ggufs/q/{made.paths[0].name}") as remote,
        open_model(made.paths[0]) as local,
    ):
        assert remote.is_remote
        for ours, theirs in zip(remote.tensors, local.tensors, strict=True):
            rows = remote.read_rows(ours, 0, ours.rows)
            assert (rows == local.read_rows(theirs, 0, theirs.rows)).all()


def test_statistics_are_read_from_where_it_is(hub, mini):
    ours = quantcli.inspect(REPO, stats=True, filter="attn_v").document["stats"]
    assert ours == quantcli.inspect(mini, stats=True, filter="attn_v").document["stats"]
    assert "model.safetensors" not in hub.downloaded()


def test_a_refusal_in_the_middle_shows_no_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with open_model(REPO) as model:
        hub.repos[REPO] = "gated"
        with pytest.raises(SourceError, match="is gated") as caught:
            model.store.read_rows("model.layers.2.mlp.up_proj.weight", 300, 308)
    assert TOKEN not in str(caught.value)
    assert TOKEN not in repr(caught.value.__cause__)


def test_a_hub_that_goes_away_in_the_middle(hub, monkeypatch):
    monkeypatch.setattr(patience, "ATTEMPTS", 4)
    with open_model(REPO) as model:
        hub.failing = 1.0
        with pytest.raises(SourceError, match="503"):
            model.store.read_rows("model.layers.2.mlp.up_proj.weight", 300, 308)


def test_columns_of_a_matrix_are_read_once(hub):
    """A range of columns asks for the lines as a whole, and the next range for nothing."""
    with open_model(REPO) as remote, open_model(MINI) as local:
        name = "model.layers.3.mlp.down_proj.weight"
        before = hub.sent
        for span in ((0, 16), (16, 100), (100, 101)):
            ours = remote.store.read_columns(name, *span)
            assert (ours == local.store.read_columns(name, *span)).all()
        assert hub.sent - before <= remote.store.tensors[name].nbytes + (1 << 17)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_does_not_wait_for_the_network(number, hub, tmp_path):
    hub.rate = 100_000.0
    env = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "quantcli", "quantize", REPO, "--type", "Q8_0", "-o", "m.gguf"]
    run = subprocess.Popen(
        command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while sum(line.startswith("PART") for line in hub.asked) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    began = time.monotonic()
    run.send_signal(number)
    _, said = run.communicate(timeout=30)
    assert time.monotonic() - began < 3
    assert run.returncode == 130, said
    assert said.splitlines()[-1] == "error: interrupted"
    assert not [path for path in tmp_path.iterdir() if "m.gguf" in path.name]


# ---- patience


def test_failures_in_a_row_end_patience_and_progress_renews_it():
    tried: list[int] = []

    def attempt(came_forward):
        tried.append(1)
        if len(tried) % 5 == 0:
            came_forward()
        raise PassingError("no")

    with pytest.raises(PassingError):
        Patience().persist(lambda _: attempt(lambda: None))
    assert len(tried) == patience.ATTEMPTS
    tried.clear()
    monkey = {"left": 50}

    def forward(came_forward):
        monkey["left"] -= 1
        if monkey["left"] == 0:
            return "done"
        came_forward()
        raise PassingError("no")

    assert Patience().persist(forward) == "done"


def test_a_stranger_is_given_up_soon():
    tried: list[int] = []

    def attempt(_):
        tried.append(1)
        raise PassingError("nobody there", answered=False)

    with pytest.raises(PassingError):
        Patience().persist(attempt)
    assert len(tried) == patience.STRANGER_ATTEMPTS


def test_a_wait_that_is_asked_for_is_kept(monkeypatch):
    waits: list[float] = []
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", lambda seconds: waits.append(seconds))
    answers = iter([PassingError("slow down", wait=7.0), None])

    def attempt(_):
        error = next(answers)
        if error is not None:
            raise error
        return 1

    assert Patience(stop).persist(attempt) == 1
    assert 7.0 <= waits[0] <= 7.7


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [("12", 12, 12), ("0", 0, 0), ("-3", 0, 0), ("1.5", 1.5, 1.5)],
)
def test_retry_after_in_seconds(value, low, high):
    assert low <= read_retry_after(value) <= high


def test_retry_after_as_a_date():
    from email.utils import formatdate

    assert 50 < read_retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert read_retry_after("Mon, 01 Jan 2001 00:00:00 GMT") == 0
    assert read_retry_after("soon") is None
    assert read_retry_after(None) is None


def test_rows_keep_their_values(hub):
    """A row in the middle, against NumPy on the file's own bytes."""
    content = hub.repos[REPO]["model.safetensors"]
    with open_model(REPO) as model:
        name = "model.embed_tokens.weight"
        row = model.store.read_rows(name, 17, 18)
        assert content.count(row.tobytes()) >= 1
        assert np.isfinite(row.astype(np.float32)).all()


@pytest.mark.slow
def test_what_runs_a_model_runs_one_that_is_elsewhere(hub, tmp_path, checkpoint):
    """A calibration and an evaluation give what they give of the folder."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    text = Path(__file__).parents[1] / "golden" / "calibration.txt"
    local = checkpoint("llama")
    hub.repos["org/tiny"] = {path.name: path.read_bytes() for path in local.iterdir()}
    hub.failing, hub.dropping = 0.1, 0.1
    sums, losses, said = [], [], []
    for number, source in enumerate(("org/tiny", local)):
        made = quantcli.calibrate(
            source, text, output=tmp_path / f"{number}.gguf", ctx=32, chunks=2
        )
        sums.append(read_importance(made.paths[0]).entries)
        said.append(any("in each walk through its layers" in note.message for note in made.notes))
        found = quantcli.evaluate(source, text, ctx=32, chunks=2, engine="torch")
        losses.append(found.document["results"][0]["perplexity"])
    assert sums[0].keys() == sums[1].keys()
    assert all((sums[0][name] == sums[1][name]).all() for name in sums[0])
    assert losses[0] == losses[1]
    assert said == [True, False]
    assert "model.safetensors" not in hub.downloaded()
