"""Every command that writes, on filesystems that fail: a sentence or the right bytes, no third.

The faults are those of tests/support/faults.c. Whatever they hit, what has a final name is whole,
and what was there before is untouched where the run failed.
"""

from __future__ import annotations

import errno
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.faults import Server, compiler, fault_server
from support.kills import KILLED, Kill, kill_all
from support.writing_commands import COMMANDS, make_words, read_all, warm

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="there is no C compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="calls are replaced as Linux names them"),
]
pytest.importorskip("transformers", reason="transformers writes the tiny model")

PLAIN = [name for name, command in COMMANDS.items() if not command.runs_model]
METHODS = [name for name, command in COMMANDS.items() if command.runs_model]
HARMLESS = ["short", "eintr", f"no-flock:{errno.ENOLCK}", f"no-flock:{errno.EOPNOTSUPP}",
            "no-fallocate", "slow-rename:5"]  # fmt: skip
HARMFUL = ["enospc:0", "enospc:20000", "eio-write:1", "eio-write:3", "eio-fsync:1", "eio-open:1",
           "eio-rename:1", "exdev"]  # fmt: skip
LEFT = (".partial/", ".partial-run/", ".partial-output/")
REASONS = r"the disk is full|[Ii]nput/output error|[Ii]nvalid cross-device link"


@dataclass(frozen=True)
class Place:
    """Where the commands run, and the bytes of each that nothing disturbed."""

    server: Server
    words: Mapping[str, Path]
    root: Path
    whole: dict[str, dict[str, bytes]]

    def begin(self, name: str, folder: str = "out") -> Path:
        """An empty folder for the outputs, or with what is to be replaced in it."""
        out = self.root / folder
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        command = COMMANDS[name]
        if command.older:
            ended = self.server.run(command.older_args(self.words, out), "count", out)
            assert ended.code == 0, ended.said
        return out

    def expected(self, name: str) -> dict[str, bytes]:
        """The files of a run that nothing disturbs."""
        if name not in self.whole:
            out = self.begin(name)
            ended = self.server.run(COMMANDS[name].args(self.words, out), "count", out)
            assert ended.code == 0, ended.said
            self.whole[name] = read_all(out)
        return self.whole[name]


def _place(root: Path, *, methods: bool) -> Iterator[Place]:
    words = make_words(root)
    with fault_server(root) as server:
        scratch = root / "warm"
        scratch.mkdir()
        warm(server, words, scratch, methods=methods)
        yield Place(server, words, root, {})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    yield from _place(tmp_path_factory.mktemp("faults"), methods=False)


@pytest.fixture(scope="module")
def methods_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    yield from _place(tmp_path_factory.mktemp("faults"), methods=True)


def _outlive(place: Place, name: str, spec: str) -> None:
    whole = place.expected(name)
    out = place.begin(name)
    ended = place.server.run(COMMANDS[name].args(place.words, out), spec, out)
    assert ended.code == 0, ended.said
    assert read_all(out) == whole


def _fail(place: Place, name: str, spec: str) -> None:
    """The run fails in a sentence and leaves what was there, or is done where nothing was hit."""
    whole = place.expected(name)
    out = place.begin(name)
    older = read_all(out)
    ended = place.server.run(COMMANDS[name].args(place.words, out), spec, out)
    found = {key: data for key, data in read_all(out).items() if not key.startswith(".")}
    if ended.code == 0:
        assert found == whole
        return
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    assert ended.code == 1, ended.said
    assert len(errors) == 1 or COMMANDS[name].several
    for error in errors:
        assert re.search(REASONS, error), ended.said
        assert str(out) in error, f"names no file: {ended.said}"
    if COMMANDS[name].several:
        assert all(data == whole[key] for key, data in found.items())
    elif any("-of-" in key for key in older):
        # Of a set the first file goes before another takes its place.
        assert found == older or all(key in whole for key in found)
    else:
        assert found == older
    left = [key for key in read_all(out) if key.endswith(LEFT)]
    assert not left or "--resume continues" in ended.said, spec


@pytest.mark.parametrize("spec", HARMLESS)
@pytest.mark.parametrize("name", PLAIN)
def test_what_a_filesystem_may_lack_changes_no_byte(place: Place, name: str, spec: str) -> None:
    _outlive(place, name, spec)


@pytest.mark.parametrize("spec", HARMFUL)
@pytest.mark.parametrize("name", PLAIN)
def test_a_failing_disk_ends_in_a_sentence(place: Place, name: str, spec: str) -> None:
    _fail(place, name, spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["short", f"no-flock:{errno.ENOLCK}"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_outlive_what_a_filesystem_may_lack(
    methods_place: Place, name: str, spec: str
) -> None:
    _outlive(methods_place, name, spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["enospc:20000", "eio-write:9", "eio-rename:1"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_end_in_a_sentence(methods_place: Place, name: str, spec: str) -> None:
    _fail(methods_place, name, spec)


def test_a_source_that_cannot_be_read_is_named(place: Place) -> None:
    """Wherever in it the disk fails."""
    out = place.begin("gguf")
    source = place.words["SOURCE"]
    reads = 0
    for number in (1, 2, 3, 5, 8, 13, 21):
        ended = place.server.run(
            COMMANDS["gguf"].args(place.words, out), f"eio-read:{number}", source
        )
        reads += ended.code != 0
        if ended.code:
            errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1
            assert re.search(rf"{source}.*[Ii]nput/output error", errors[0]), ended.said
            assert read_all(out) == {}
        shutil.rmtree(out)
        out.mkdir()
    assert reads > 3


def test_without_locks_what_is_there_may_be_another_run(place: Place) -> None:
    out = place.begin("gguf")
    partial = out / ".m.gguf.partial"
    killed = place.server.run(COMMANDS["gguf"].args(place.words, out), "kill:20", out)
    assert killed.code == KILLED
    assert partial.is_dir()
    ended = place.server.run(
        COMMANDS["gguf"].args(place.words, out), f"no-flock:{errno.ENOLCK}", out
    )
    assert ended.code == 1
    assert "its filesystem has no locks" in ended.said
    assert "remove it if none is" in ended.said
    assert next(iter(read_all(out))) == ".m.gguf.partial/"


def test_without_fallocate_nothing_is_written_twice(place: Place) -> None:
    """There are as many writes as with it: none into every 4 KiB beforehand."""
    counts = []
    for spec in ("writes", "no-fallocate"):
        out = place.begin("gguf")
        ended = place.server.run(COMMANDS["gguf"].args(place.words, out), spec, out)
        assert ended.code == 0, ended.said
        counts.append(ended.count)
    assert counts[0] == counts[1] > 0


def _check(kills: list[Kill]) -> None:
    assert kills
    assert [kill for kill in kills if kill.wrong] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "gguf-replaced",
        "set-replaced",
        "folder-replaced",
        "export-set",
        "several",
        "several-layouts",
    ],
)
def test_a_killed_run_leaves_old_or_new(place: Place, name: str) -> None:
    """``scripts/kill-matrix`` does it at every instant, and to every command."""
    _check(list(kill_all(place.server, name, place.words, place.root / "kills", 8)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["calibrate", "gptq", "several-gptq"])
def test_a_killed_run_goes_on_to_the_same_bytes(methods_place: Place, name: str) -> None:
    kills = list(
        kill_all(methods_place.server, name, methods_place.words, methods_place.root / "kills", 4)
    )
    _check(kills)
    assert any(kill.resumed for kill in kills)
