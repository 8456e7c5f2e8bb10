"""Models and outputs in object stores: the same bytes, and nothing by halves."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import quantcli
from quantcli import interrupts
from quantcli.cli.app import run
from quantcli.errors import MissingExtraError, OutputError, SourceError, UsageError
from quantcli.exports.to_store import StoreOutput
from quantcli.model import open_model
from quantcli.sources import store as stores
from quantcli.sources.resolve import resolve
from quantcli.sources.store import explain_store, is_store
from quantcli.types import row_count


class Trouble(MemoryFileSystem):
    """A store in memory that fails as it is told to; ``trouble://``."""

    protocol = "trouble"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    fails: ClassVar[dict[str, list[Exception]]] = {}
    """Errors that the next calls of a method raise."""
    whole = False
    """Whether it ignores ranges."""
    asked: ClassVar[list[str]] = []
    lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("trouble://")))

    def _trip(self, method: str) -> None:
        with self.lock:
            self.asked.append(method)
            if self.fails.get(method):
                raise self.fails[method].pop(0)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        self._trip("cat_file")
        if self.whole:
            return bytes(super().cat_file(path))
        return bytes(super().cat_file(path, start=start, end=end, **more))

    def put_file(self, lpath: str, rpath: str, **more: Any) -> None:
        self._trip("put_file")
        super().put_file(lpath, rpath, **more)

    def pipe_file(self, path: str, value: bytes, **more: Any) -> None:
        self._trip("pipe_file")
        super().pipe_file(path, value, **more)

    def info(self, path: str, **more: Any) -> dict[str, Any]:
        self._trip("info")
        found = dict(super().info(path, **more))
        if found["type"] == "file":
            import hashlib

            found["ETag"] = f'"{hashlib.md5(super().cat_file(path)).hexdigest()}"'
        return found


class Denied(OSError):
    """As botocore words it."""

    def __init__(self) -> None:
        where = "https://b.s3/x?X-Amz-Signature=5ecre7&AWSAccessKeyId=AKIA5ecre7"
        super().__init__(f"An error occurred (403) when calling PutObject: Forbidden {where}")


@pytest.fixture
def bucket(
    mini: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> MemoryFileSystem:
    """``trouble://bucket/models/mini`` with the small model, and temporary files of its own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("made")))
    monkeypatch.setattr(Trouble, "store", {})
    monkeypatch.setattr(Trouble, "pseudo_dirs", [""])
    monkeypatch.setattr(Trouble, "fails", {})
    monkeypatch.setattr(Trouble, "whole", False)
    monkeypatch.setattr(Trouble, "asked", [])
    fsspec.register_implementation("trouble", Trouble, clobber=True)
    filesystem = Trouble()
    for path in mini.iterdir():
        MemoryFileSystem.pipe_file(
            filesystem, f"/bucket/models/mini/{path.name}", path.read_bytes()
        )
    return filesystem


MODEL, OUT = "trouble://bucket/models/mini", "trouble://bucket/out"


def _content(filesystem: MemoryFileSystem, path: str) -> bytes:
    return bytes(MemoryFileSystem.cat_file(filesystem, path))


def _names(filesystem: MemoryFileSystem, folder: str) -> set[str]:
    return {path.removeprefix(folder + "/") for path in filesystem.find(folder)}


# ---- sources


def test_every_row_is_that_of_the_file(bucket, mini):
    Trouble.fails = {"cat_file": [OSError("reset by peer"), TimeoutError()] * 3}
    with open_model(MODEL) as remote, open_model(mini) as local:
        assert remote.is_remote
        for name, info in local.store.tensors.items():
            rows = row_count(info.shape)
            ours = remote.store.read_rows(name, 0, rows).tobytes()
            assert ours == local.store.read_rows(name, 0, rows).tobytes()
        folder = remote.path
        assert not (folder / "model.safetensors").exists()
        assert folder.name == "mini"


def test_a_quantization_has_the_bytes_of_a_local_one(bucket, mini, tmp_path):
    ours = quantcli.quantize(MODEL, tmp_path / "ours", type="Q4_K_M")
    theirs = quantcli.quantize(mini, tmp_path / "theirs", type="Q4_K_M")
    with open_model(ours.paths[0]) as one, open_model(theirs.paths[0]) as other:
        assert ours.source_digest == theirs.source_digest
        for mine, its in zip(one.tensors, other.tensors, strict=True):
            assert (one.read_rows(mine, 0, mine.rows) == other.read_rows(its, 0, its.rows)).all()


def test_a_gguf_is_inspected_and_exported_from_there(bucket, mini, tmp_path):
    local = quantcli.quantize(mini, tmp_path / "m.gguf", type="Q4_0").paths[0]
    MemoryFileSystem.pipe_file(bucket, "/bucket/q/m.gguf", local.read_bytes())
    seen = quantcli.inspect("trouble://bucket/q/m.gguf").document
    assert seen["tensors"] == quantcli.inspect(local).document["tensors"]
    made = quantcli.export("trouble://bucket/q/m.gguf", tmp_path / "f.gguf", to="gguf", dtype="f16")
    assert made.paths[0].stat().st_size == made.nbytes


def test_what_needs_a_file_here_gets_a_copy(bucket, mini, tmp_path):
    """llama.cpp, say; the copy goes when the process ends."""
    local = quantcli.quantize(mini, tmp_path / "m.gguf", type="Q4_0").paths[0]
    MemoryFileSystem.pipe_file(bucket, "/bucket/q/m.gguf", local.read_bytes())
    found = resolve("trouble://bucket/q/m.gguf")
    assert not found.is_remote
    assert found.path.read_bytes() == local.read_bytes()
    whole = resolve(MODEL)
    assert (whole.path / "model.safetensors").read_bytes() == (
        mini / "model.safetensors"
    ).read_bytes()
    interrupts.leave()
    assert not found.path.exists()
    assert not whole.path.exists()


def test_file_addresses_are_paths(mini):
    with open_model(f"file://{mini}") as model:
        assert not model.is_remote
        assert model.path == mini


def test_an_object_that_changes_while_it_is_read_makes_no_output(bucket, tmp_path):
    changed = bytearray(_content(bucket, "/bucket/models/mini/model.safetensors"))
    changed[-1] ^= 1

    def change(event: object) -> None:
        MemoryFileSystem.pipe_file(bucket, "/bucket/models/mini/model.safetensors", bytes(changed))

    with pytest.raises(SourceError, match=r"trouble://bucket/\S+model.safetensors: has changed"):
        quantcli.quantize(MODEL, tmp_path / "m.gguf", type="Q8_0", on_event=change)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("trouble://bucket/models/none", "there is no such folder, or nothing is in it"),
        ("trouble://bucket/models/none.gguf", "there is no such object or bucket"),
        ("trouble://bucket/models/mini/model.safetensors", "is one file of a checkpoint"),
        ("trouble://bucket/models", "holds no config.json, so it is not a checkpoint"),
    ],
)
def test_what_is_not_there(target, sentence, bucket):
    with pytest.raises(SourceError, match=sentence) as caught:
        open_model(target)
    assert caught.value.message.startswith("trouble://bucket/models")


def test_a_store_without_ranges(bucket):
    Trouble.whole = True
    with pytest.raises(SourceError, match="does not send it in parts"):
        open_model(MODEL)


def test_a_store_that_refuses_to_be_read(bucket):
    Trouble.fails = {"cat_file": [Denied()] * 3}
    with pytest.raises(SourceError, match="refuses access") as caught:
        open_model(MODEL)
    assert "5ecre7" not in str(caught.value)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs")])
def test_a_missing_package_is_named(scheme, package, tmp_path, mini, monkeypatch):
    def absent(protocol: str) -> None:
        raise ImportError(f"install {package}")

    monkeypatch.setattr("fsspec.core.get_filesystem_class", absent)
    for call in (
        lambda: open_model(f"{scheme}://bucket/model"),
        lambda: quantcli.quantize(mini, f"{scheme}://bucket/m.gguf", type="Q8_0"),
    ):
        with pytest.raises(MissingExtraError) as caught:
            call()
        assert caught.value.hint == f"pip install {package}"


@pytest.mark.parametrize(
    ("target", "store"),
    [("s3://b/m", True), ("gs://b/m", True), ("az://b/m", True), ("memory://m", True),
     ("hf://a/b", False), ("https://a/b", False), ("a/b", False), ("nosuch://a", False)],
)  # fmt: skip
def test_which_addresses_are_stores(target, store):
    assert is_store(target) is store


def test_credentials_are_not_shown():
    said = str(explain_store("s3://b/x", OSError("GET /x?Signature=5ecre7&sig=5ecre7 failed")))
    assert "5ecre7" not in said
    assert stores.PACKAGES["s3"] == "s3fs"


# ---- outputs


def test_a_file_appears_whole_and_nothing_stays_here(bucket, mini, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    done = quantcli.quantize(mini, f"{OUT}/m.gguf", type="Q4_K_M")
    assert [str(path) for path in done.paths] == [f"{OUT}/m.gguf"]
    assert done.document["paths"] == [f"{OUT}/m.gguf"]
    local = quantcli.quantize(mini, tmp_path / "m.gguf", type="Q4_K_M").paths[0]
    assert _content(bucket, "/bucket/out/m.gguf") == local.read_bytes()
    assert _names(bucket, "/bucket/out") == {"m.gguf"}
    assert not list((tmp_path / "tmp").iterdir())


def test_a_folder_whose_config_comes_last(bucket, mini, monkeypatch):
    order: list[str] = []
    put = Trouble.put_file

    def watch(self: Trouble, lpath: str, rpath: str, **more: Any) -> None:
        order.append(Path(lpath).name)
        put(self, lpath, rpath, **more)

    monkeypatch.setattr(Trouble, "put_file", watch)
    done = quantcli.quantize(mini, f"{OUT}/folder", to="gptq")
    assert order[-2:] == ["config.json", "quantcli.json"]
    assert _names(bucket, "/bucket/out/folder") == set(order)
    with open_model(f"{OUT}/folder", table=False) as model:
        assert model.is_remote
    assert str(done.paths[0]).startswith(OUT)


def test_a_set_and_an_export(bucket, mini):
    quantcli.quantize(mini, f"{OUT}/set/", type=["Q4_0", "Q8_0"])
    names = {"bookworm-mini-Q4_0.gguf", "bookworm-mini-Q8_0.gguf"}
    assert _names(bucket, "/bucket/out/set") == names
    done = quantcli.export(
        f"{OUT}/set/bookworm-mini-Q8_0.gguf", f"{OUT}/f.gguf", to="gguf", dtype="f16"
    )
    assert len(_content(bucket, "/bucket/out/f.gguf")) == done.nbytes


def test_the_command_prints_addresses(bucket, mini, capsys):
    assert run(["quantize", str(mini), "--type", "Q8_0", "-o", f"{OUT}/m.gguf", "-q"]) == 0
    assert capsys.readouterr().out == f"{OUT}/m.gguf\n"
    assert run(["quantize", str(mini), "--type", "Q8_0", "-o", f"{OUT}/n.gguf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["paths"] == [f"{OUT}/n.gguf"]
    assert run(["quantize", str(mini), "--type", "Q8_0", "-o", f"{OUT}/o.gguf", "--dry-run"]) == 0
    assert f"{OUT}/o.gguf" in capsys.readouterr().out
    assert _names(bucket, "/bucket/out") == {"m.gguf", "n.gguf"}


def test_what_exists_stays_without_force(bucket, mini):
    quantcli.quantize(mini, f"{OUT}/m.gguf", type="Q8_0")
    before = _content(bucket, "/bucket/out/m.gguf")
    with pytest.raises(OutputError, match="exists already"):
        quantcli.quantize(mini, f"{OUT}/m.gguf", type="Q4_0")
    assert _content(bucket, "/bucket/out/m.gguf") == before
    quantcli.quantize(mini, f"{OUT}/m.gguf", type="Q4_0", force=True)
    assert _content(bucket, "/bucket/out/m.gguf") != before


def test_a_store_without_rights_is_told_before_the_work(bucket, mini):
    Trouble.fails = {"pipe_file": [Denied()]}
    heard: list[object] = []
    with pytest.raises(OutputError, match="refuses access") as caught:
        quantcli.quantize(mini, f"{OUT}/m.gguf", type="Q8_0", on_event=heard.append)
    assert "5ecre7" not in str(caught.value)
    assert heard == []
    assert _names(bucket, "/bucket/out") == set()


def test_an_upload_that_fails_leaves_nothing_there_and_all_here(
    bucket, mini, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    notes: list[Any] = []
    real, calls = Trouble.put_file, []

    def fail_third(self: Trouble, lpath: str, rpath: str, **more: Any) -> None:
        calls.append(rpath)
        if len(calls) == 3:
            raise OSError("connection reset")
        real(self, lpath, rpath, **more)

    monkeypatch.setattr(Trouble, "put_file", fail_third)
    with pytest.raises(OutputError, match="connection reset"):
        quantcli.quantize(mini, f"{OUT}/folder", to="gptq", on_event=notes.append)
    assert _names(bucket, "/bucket/out") == set()
    (kept,) = tmp_path.iterdir()
    assert (kept / "folder" / "config.json").exists()
    assert any(str(kept) in getattr(event, "message", "") for event in notes)


def test_a_copy_that_differs_is_noticed(bucket, mini, monkeypatch):
    real = Trouble.put_file

    def damage(self: Trouble, lpath: str, rpath: str, **more: Any) -> None:
        real(self, lpath, rpath, **more)
        content = bytearray(_content(self, rpath))
        content[100] ^= 1
        MemoryFileSystem.pipe_file(self, rpath, bytes(content))

    monkeypatch.setattr(Trouble, "put_file", damage)
    with pytest.raises(OutputError, match="digest is not that of what was sent"):
        quantcli.quantize(mini, f"{OUT}/m.gguf", type="Q8_0")
    assert _names(bucket, "/bucket/out") == set()


@pytest.mark.parametrize("options", [{"resume": True}, {"push": "a/b"}])
def test_options_that_need_files_here(options, bucket, mini):
    with pytest.raises(UsageError, match="needs an output on this machine"):
        quantcli.quantize(mini, f"{OUT}/m.gguf", type="Q8_0", **options)


def test_a_bucket_alone_is_no_place():
    with pytest.raises(UsageError, match="names a bucket alone"):
        StoreOutput("memory://bucket", force=False, dry_run=True)
