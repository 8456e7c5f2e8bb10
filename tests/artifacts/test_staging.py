"""Nothing that is not ours is replaced, written into or removed."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quantcli.artifacts import space, staging
from quantcli.artifacts.atomic import AtomicFiles
from quantcli.artifacts.atomic_folder import MANIFEST, AtomicFolder
from quantcli.artifacts.staging import claim, own_folder, partial_path, remove_own
from quantcli.errors import OutputError
from quantcli.layerwise.checkpoint import Checkpoint


def _write_file(path: Path) -> None:
    with AtomicFiles({path: 3}, force=True) as files:
        files.write(path, 0, b"new")
        files.publish()


def _write_folder(path: Path) -> None:
    with AtomicFolder(path, {MANIFEST: 3}, force=True) as folder:
        folder.write(MANIFEST, 0, b"new")
        folder.publish()


Writer = Callable[[Path], None]
both = pytest.mark.parametrize("write", [_write_file, _write_folder])


def _contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@both
def test_a_node_is_not_replaced(tmp_path: Path, write: Writer) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name, words in (("pipe", "is a FIFO"), ("link", "is a FIFO"), ("null", "is a device")):
        with pytest.raises(OutputError, match=rf"{name} {words}, not a file"):
            write(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "null", "pipe"]
    assert (tmp_path / "null").is_symlink()


@both
def test_a_stream_is_not_written(tmp_path: Path, write: Writer) -> None:
    """Not even where standard output is a regular file."""
    with (tmp_path / "out").open("wb") as file:
        (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{file.fileno()}")
        places = [tmp_path / "stdout", Path(f"/proc/self/fd/{file.fileno()}"), Path("-")]
        for place in places:
            with pytest.raises(OutputError, match="not written to a stream"):
                write(place)
    assert (tmp_path / "stdout").is_symlink()


def test_a_link_to_nothing_needs_force(tmp_path: Path) -> None:
    link = tmp_path / "a.bin"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists already"), AtomicFiles({link: 3}):
        pass
    assert link.is_symlink()


@both
@pytest.mark.parametrize("kind", ["folder", "file", "link to a folder", "link to a file"])
def test_what_others_planted_is_refused_and_stays(tmp_path: Path, write: Writer, kind: str) -> None:
    precious = tmp_path / "precious"
    target = tmp_path / "a.bin"
    partial = partial_path(target)
    place = precious if "link" in kind else partial
    if "folder" in kind:
        place.mkdir()
        (place / "thesis").write_bytes(b"years of work")
    else:
        place.write_bytes(b"years of work")
    if "link" in kind:
        partial.symlink_to(precious)
    before = _contents(tmp_path)
    with pytest.raises(OutputError, match=r"\.a\.bin\.partial is not quantcli's"):
        write(target)
    assert _contents(tmp_path) == before


@both
def test_links_in_what_a_run_left_are_not_followed(tmp_path: Path, write: Writer) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").write_bytes(b"years of work")
    target = tmp_path / "a.bin"
    left = claim(target)
    for name in ("file", "files"):
        (left.folder / name).symlink_to(precious)
    os.close(left.descriptor)
    write(target)
    assert (precious / "thesis").read_bytes() == b"years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "precious"]


def test_a_folder_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    """A run was killed between moving the old folder aside and giving the new one its name."""
    target = tmp_path / "made"
    left = claim(target)
    (left.folder / "replaced").mkdir()
    (left.folder / "replaced" / MANIFEST).write_bytes(b"old")
    os.close(left.descriptor)
    with pytest.raises(OutputError, match="exists already"), AtomicFolder(target, {MANIFEST: 3}):
        pass
    assert (target / MANIFEST).read_bytes() == b"old"
    _write_folder(target)
    assert (target / MANIFEST).read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@both
def test_a_lock_on_what_has_lost_its_name_is_none(
    tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run A ends and run C begins while B stands between opening and locking A's folder."""
    target = tmp_path / "a.bin"
    first = claim(target)
    later = []
    lock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if not later:
            later.append(descriptor)
            first.remove()
            later.append(claim(target))
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match="another run is writing"):
        write(target)
    assert partial_path(target).is_dir()
    later[1].remove()
    write(target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@both
def test_without_locks_who_makes_the_folder_has_it(
    tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    target = tmp_path / "a.bin"
    write(target)
    held = claim(target)
    with pytest.raises(OutputError, match=r"no locks that would tell.*remove it if none is"):
        write(target)
    assert (held.folder / staging.MARK).exists()
    held.remove()


def test_without_reserved_space_no_byte_is_written_before_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "_allocate", lambda *_: errno.EOPNOTSUPP)
    target = tmp_path / "a.bin"
    with AtomicFiles({target: 64 << 20}) as files:
        (made,) = partial_path(target).glob("[!.]*")
        assert made.stat().st_size == 64 << 20
        assert made.stat().st_blocks == 0
        files.write(target, 0, b"abc")
        files.publish()
    assert target.stat().st_size == 64 << 20


def test_the_system_reserves_what_it_is_asked_for(tmp_path: Path) -> None:
    with (tmp_path / "a.bin").open("wb") as file:
        reserved = space.reserve(file.fileno(), 1 << 20)
        found = os.fstat(file.fileno())
    assert found.st_size == 1 << 20
    assert not reserved or found.st_blocks * 512 >= 1 << 20


def test_a_set_killed_between_its_names_has_no_first_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [tmp_path / f"m-{n}.gguf" for n in range(3)]
    for name in names:
        name.write_bytes(b"old")
    replace = Path.replace
    renamed = []

    def killed(self: Path, target: Path) -> Path:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with (
        pytest.raises(KeyboardInterrupt),
        AtomicFiles(dict.fromkeys(names, 3), force=True) as files,
    ):
        for name in names:
            files.write(name, 0, b"new")
        files.publish()
    assert [name.read_bytes() if name.exists() else None for name in names] == [
        None,
        b"new",
        b"old",
    ]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_run_works_in_no_folder_of_others(tmp_path: Path, kind: str) -> None:
    """Checkpoints and the work of transforms lie beside the output, too."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").write_bytes(b"years of work")
    folder = {"folder": precious, "file": precious / "thesis", "link": tmp_path / "link"}[kind]
    if kind == "link":
        folder.symlink_to(precious)
    before = _contents(tmp_path)
    for empty in (False, True):
        with pytest.raises(OutputError, match="is not quantcli's"):
            own_folder(folder, empty=empty)
    remove_own(folder)
    with pytest.raises(OutputError, match="is not quantcli's"):
        Checkpoint(folder, {}).begin(resume=False, force=True)
    Checkpoint(folder, {}).remove()
    assert _contents(tmp_path) == before


def test_a_runs_own_folder_is_taken_over_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    own_folder(folder, empty=True)
    (folder / "left").write_bytes(b"half")
    own_folder(folder, empty=False)
    assert (folder / "left").exists()
    own_folder(folder, empty=True)
    assert [path.name for path in folder.iterdir()] == [staging.MARK]
    remove_own(folder)
    assert not folder.exists()


def test_what_is_left_of_a_removal_is_known_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when any one of the files has gone: the folder has its mark, or is empty."""
    folder = tmp_path / ".m.partial-run"
    removed: list[str] = []
    unlink = Path.unlink

    def watch(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        left = {each.name for each in folder.iterdir()}
        assert staging.MARK in left or not left
        removed.append(path.name)

    own_folder(folder, empty=True)
    for name in ("a", "state.json", "z"):
        (folder / name).write_text("x")
    monkeypatch.setattr(Path, "unlink", watch)
    remove_own(folder)
    assert not folder.exists()
    assert sorted(removed) == sorted(["a", "state.json", "z", staging.MARK])
