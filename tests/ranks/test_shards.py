"""Shards of a job array: any order, killed and run again, on poor filesystems; the same bytes."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults import Server, compiler, fault_server
from support.kills import KILLED
from support.writing_commands import make_words, read_all

import quantcli
from quantcli.cli.app import run

pytest.importorskip("transformers", reason="transformers writes the tiny model")

LINES = {
    "gguf": "SOURCE --type Q4_K_M -o OUT/m.gguf",
    "shards of a gguf": "SOURCE --type Q4_0 --split-max-size 100K -o OUT/m.gguf",
    "several types": "SOURCE --type Q4_0,Q8_0 -o OUT/",
    "scales of tensors": "SOURCE --type NVFP4 -o OUT/m.gguf",
    "tower": "WRAPPER --type Q4_0 --mmproj -o OUT/m.gguf",
    "gptq": "SOURCE --to gptq --group-size 32 -o OUT/model",
    "several folders": "SOURCE --to gguf,gptq,mlx --type Q4_0 --bits 4 --group-size 32 -o OUT/",
    "weights": "SOURCE --to hf --type Q4_0 --split-max-size 100K -o OUT/model",
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_words(tmp_path_factory.mktemp("models"))


def _args(line: str, words: dict[str, Path], out: Path, more: str = "") -> list[str]:
    out.mkdir(exist_ok=True)
    filled = [str(words.get(word, word)).replace("OUT/", f"{out}/") for word in line.split()]
    return ["quantize", *filled, "--threads", "1", *more.split()]


def _read(out: Path) -> dict[str, bytes]:
    """All files but an empty journal's: hidden ones would be something left behind."""
    return read_all(out)


@pytest.mark.parametrize("name", LINES)
def test_shards_give_the_bytes_of_one_process(
    name: str, words: dict[str, Path], tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(_args(LINES[name], words, whole)) == 0
    for shard in ("2/3", "3/3", "1/3"):
        assert not [path for path in out.glob("*") if not path.name.startswith(".")]
        assert run(_args(LINES[name], words, out, f"--shard {shard}")) == 0
    assert _read(out) == _read(whole)


def test_the_merge_waits_for_all_and_publishes(
    words: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = LINES["gguf"]
    assert run(_args(line, words, out, "--shard merge")) == 2
    assert "no shard of" in capsys.readouterr().err
    assert read_all(out) == {}
    assert run(_args(line, words, out, "--shard 2/2 --json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"schema": "quantcli.shard/1", "shard": 2, "of": 2, "published": False}
    assert run(_args(line, words, out, "--shard merge")) == 1
    assert "1 of 2 shards are not done: shard 1/2" in capsys.readouterr().err
    # As a machine that ends between the last slab and the name would leave it.
    meeting = out / ".m.gguf.partial" / "shared-meeting"
    assert run(_args(line, words, out, "--shard 1/2")) == 0
    assert not meeting.exists()
    kept = read_all(out)
    shutil.rmtree(out)
    for shard in ("1/2", "2/2"):
        made = quantcli.quantize(words["SOURCE"], _file(out), type="Q4_K_M", threads=1, shard=shard)
    assert made.paths == (out / "m.gguf",)
    assert read_all(out) == kept


def _file(out: Path) -> Path:
    out.mkdir(exist_ok=True)
    return out / "m.gguf"


def test_a_torn_slab_is_found_and_made_anew(
    words: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    line = LINES["gguf"]
    assert run(_args(line, words, whole)) == 0
    assert run(_args(line, words, out, "--shard 1/2")) == 0
    (part,) = (path for path in (out / ".m.gguf.partial").glob("shared-*") if path.is_file())
    # A byte in the middle of what the shard has written, and the end of its last slab.
    logs = (out / ".m.gguf.partial" / "shared-meeting").glob("slabs-0-*")
    runs = [json.loads(text)[-1][0] for log in logs for text in log.read_text().splitlines()]
    _, offset, length, _, _ = max(runs, key=lambda found: found[2])
    data = bytearray(part.read_bytes())
    data[offset + length // 2] ^= 1
    _, last, size, _, _ = runs[-1]
    data[last + size - 16 : last + size] = bytes(16)
    part.write_bytes(data)
    capsys.readouterr()
    assert run(_args(line, words, out, "--shard 2/2")) == 0
    assert "2 slabs were not as they were left, and made anew" in capsys.readouterr().err
    assert _read(out) == _read(whole)


def test_another_recipe_model_or_number_is_refused(
    words: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = LINES["gguf"]
    assert run(_args(line, words, out, "--shard 1/2")) == 0
    before = read_all(out)
    copy = tmp_path / "source"
    shutil.copytree(words["SOURCE"], copy)
    (weights,) = copy.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 + length :] = bytes(len(data) - 8 - length)
    weights.write_bytes(data)
    for more, other, what in (
        ("--shard 2/2 --pure", words, "their recipe"),
        ("--shard 2/2", words | {"SOURCE": copy}, "their model"),
        ("--shard 2/3", words, "how many there are"),
    ):
        capsys.readouterr()
        assert run(_args(line, other, out, more)) == 2
        said = capsys.readouterr().err
        assert said.count("error: ") == 1
        assert "and shard 1/2, which ran on" in said
        assert f"differ in {what}" in said
        assert read_all(out) == before
    assert run(_args(line, words, out, "--shard 2/2")) == 0


def test_a_single_run_is_refused_while_shards_work_and_clears_what_they_left(
    words: dict[str, Path], tmp_path: Path
) -> None:
    from quantcli.artifacts.staging import claim

    out = tmp_path / "out"
    line = LINES["gguf"]
    assert run(_args(line, words, out, "--shard 1/2")) == 0
    held = claim(out / "m.gguf", shared=True)
    assert run(_args(line, words, out)) == 1
    held.leave()
    assert run(_args(line, words, out)) == 0
    assert list(read_all(out)) == ["m.gguf"]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "1/0", "-1/2", "a/b"])
def test_a_number_outside_its_range_is_refused(
    shard: str, words: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(_args(LINES["gguf"], words, out, f"--shard={shard}")) == 2
    assert f"--shard {shard}" in capsys.readouterr().err
    assert read_all(out) == {}


def test_methods_do_not_go_by_shards(
    words: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(_args(LINES["gguf"], words, out, "--method gptq --shard 1/2")) == 2
    assert "torchrun" in capsys.readouterr().err


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, words: dict[str, Path]) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("faults")
    with fault_server(folder) as found:
        assert found.warm(_args(LINES["gguf"], words, folder / "warm")).code == 0
        yield found


needs_shim = pytest.mark.skipif(
    compiler() is None or sys.platform != "linux", reason="the shim is C for Linux"
)


@pytest.mark.slow
@needs_shim
@pytest.mark.parametrize("name", ["gguf", "gptq", "several types"])
def test_a_shard_that_is_killed_goes_on(
    name: str, server: Server, words: dict[str, Path], tmp_path: Path
) -> None:
    line = LINES[name]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(_args(line, words, whole)) == 0
    first, last = (_args(line, words, out, f"--shard {i}/2") for i in (1, 2))
    count = server.run(first, "count", out).count
    assert server.run(last, "count", out).code == 0
    for spec in [f"{kind}:{int(share * count)}" for kind, share in
                 (("kill", 0.2), ("torn", 0.5), ("kill", 0.7), ("torn", 0.95))]:  # fmt: skip
        shutil.rmtree(out)
        out.mkdir()
        assert server.run(first, spec, out).code == KILLED
        assert server.run(last, "torn:25", out).code == KILLED
        assert server.run(last, "count", out).code == 0
        ended = server.run(first, "count", out)
        assert ended.code == 0, ended.said
        assert _read(out) == _read(whole), spec


@pytest.mark.slow
@needs_shim
@pytest.mark.parametrize("name", ["gguf", "gptq"])
def test_the_last_shard_may_be_killed_as_it_publishes(
    name: str, server: Server, words: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    line = LINES[name]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(_args(line, words, whole)) == 0
    first, last = (_args(line, words, out, f"--shard {i}/2") for i in (1, 2))
    assert server.run(first, "count", out).code == 0
    count = server.run(last, "count", out).count
    # Every call from the claim to the removal of the last file of the meeting.
    for number in range(count - 14, count + 1, 2):
        shutil.rmtree(out)
        out.mkdir()
        assert server.run(first, "count", out).code == 0
        assert server.run(last, f"kill:{number}", out).code == KILLED
        visible = {n: d for n, d in read_all(out).items() if not n.startswith(".")}
        assert visible in ({}, _read(whole)), number
        monkeypatch.setenv("QUANTCLI_RANK_TIMEOUT", "0.5")
        code = run(_args(line, words, out, "--shard merge"))
        assert code == (1 if visible else 0), number
        visible = {n: d for n, d in read_all(out).items() if not n.startswith(".")}
        assert visible == _read(whole), number


@needs_shim
@pytest.mark.parametrize("name", ["gguf", "gptq", "shards of a gguf"])
@pytest.mark.parametrize(
    "spec", [f"no-flock:{errno.ENOLCK}", f"no-flock:{errno.EOPNOTSUPP}", "no-fallocate", "short"]
)
def test_what_a_shared_filesystem_may_lack_changes_no_byte(
    spec: str, name: str, server: Server, words: dict[str, Path], tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(_args(LINES[name], words, whole)) == 0
    for shard in ("1/2", "2/2"):
        ended = server.run(_args(LINES[name], words, out, f"--shard {shard}"), spec, out)
        assert ended.code == 0, ended.said
    assert _read(out) == _read(whole)
