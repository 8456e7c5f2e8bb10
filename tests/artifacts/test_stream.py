"""``-o -``: the bytes of the file, in order, into a pipe."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from pathlib import Path

import gguf
import pytest
from support.process import command, environment

import quantcli
from quantcli.artifacts import stream
from quantcli.artifacts.stream import STREAM, StreamSink
from quantcli.errors import OutputError, UsageError
from quantcli.sources.gguf import open_gguf


class _Pipe:
    """Standard output as a pipe that this test reads."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.found = bytearray()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while part := os.read(self.reader, 1 << 16):
            self.found += part

    def close(self) -> bytes:
        os.close(self.writer)
        self._thread.join()
        os.close(self.reader)
        return bytes(self.found)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> _Pipe:
    made = _Pipe()
    monkeypatch.setattr(stream, "_DESCRIPTOR", made.writer)
    return made


def _stdout(*args: object, **more: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*command(), *map(str, args)],
        capture_output=True, env=environment(), check=False, **more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["Q4_K_M", "IQ4_NL"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_pipe_gets_the_file_without_its_digest(kind, threads, mini, tmp_path):
    done = _stdout("quantize", mini, "--type", kind, "-o", "-", "-t", threads)
    assert done.returncode == 0, done.stderr
    assert b"became" in done.stderr
    (tmp_path / "s.gguf").write_bytes(done.stdout)
    kept = quantcli.quantize(mini, tmp_path / "f.gguf", type=kind).paths[0]
    streamed, filed = (gguf.GGUFReader(path) for path in (tmp_path / "s.gguf", kept))
    assert set(filed.fields) - set(streamed.fields) == {"quantcli.source.digest"}
    assert set(streamed.fields) <= set(filed.fields)
    for ours, theirs in zip(streamed.tensors, filed.tensors, strict=True):
        assert (ours.name, ours.tensor_type) == (theirs.name, theirs.tensor_type)
        assert ours.data.tobytes() == theirs.data.tobytes()
    with_own = open_gguf(tmp_path / "s.gguf")
    assert with_own.files[0].stat().st_size == sum(with_own.file_sizes.values())
    with_own.close()


def test_a_split_source_with_stacked_tensors(pipe, tmp_path, checkpoint):
    """Experts are stored one by one and stacked in the GGUF, so slabs have many sources."""
    source = checkpoint("qwen3-moe")
    quantcli.quantize(source, "-", type="Q8_0", threads=3)
    (tmp_path / "s.gguf").write_bytes(pipe.close())
    kept = quantcli.quantize(source, tmp_path / "f.gguf", type="Q8_0").paths[0]
    tensors = [{t.name: t.data.tobytes() for t in gguf.GGUFReader(each).tensors}
               for each in (tmp_path / "s.gguf", kept)]  # fmt: skip
    assert tensors[0] == tensors[1]


def test_parts_in_any_order_from_several_threads(pipe, monkeypatch):
    monkeypatch.setattr(stream, "_MOST_WAITING", 300)
    chance, extents, place = random.Random(3), [], 0
    whole = bytearray()
    for _ in range(60):
        length, gap = chance.randrange(0, 90), chance.choice([0, 0, 5])
        extents.append((place, length))
        whole += chance.randbytes(length) + bytes(gap if length else 0)
        place = len(whole)
    begun = iter([each for each in extents if each[1]])
    lock = threading.Lock()
    with StreamSink(place, extents) as sink:

        def work() -> None:
            # Each takes the next one, as threads take slabs, and is done with it at any time.
            while True:
                with lock:
                    part = next(begun, None)
                if part is None:
                    return
                time.sleep(chance.random() / 500)
                sink.write(STREAM, part[0], whole[part[0] : part[0] + part[1]])

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        sink.flush()
    assert pipe.close() == bytes(whole)


def test_a_reader_that_leaves(mini):
    process = subprocess.Popen(
        [*command(), "quantize", mini, "--type", "Q8_0", "-o", "-"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    process.stdout.read(1000)
    process.stdout.close()
    with process.stderr as talk:
        said = talk.read().decode()
    assert process.wait(60) == 1
    assert "error: standard output: its reader left after" in said
    assert "Traceback" not in said


def test_a_failing_weight_ends_the_stream(pipe, mini, tmp_path, monkeypatch):
    """A sentence, no success, and no thread that waits for its turn."""
    folder = tmp_path / "m"
    folder.mkdir()
    for path in mini.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-400:] = b"\xff\x7f" * 200  # NaN in bfloat16
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(quantcli.errors.WeightError, match="nan"):
        quantcli.quantize(folder, "-", type="Q4_0", threads=3)
    assert len(pipe.close()) < 4 << 20


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"type": ["Q4_0", "Q8_0"]}, "standard output takes one file"),
        ({"to": "gptq"}, "--to gptq makes a folder"),
        ({"type": "Q4_0", "split_max_size": "1M"}, "--split-max-size makes several files"),
        ({"type": "Q4_0", "push": "a/b"}, "--push needs a file"),
        ({"type": "Q4_0", "report": "r"}, "--report needs a file"),
    ],
)
def test_what_a_pipe_cannot_take(options, sentence, pipe, mini):
    with pytest.raises(UsageError, match=sentence):
        quantcli.quantize(mini, "-", **options)
    assert pipe.close() == b""


def test_a_method_and_a_calibration_need_a_place(pipe, mini, tmp_path):
    pytest.importorskip("torch")
    text = tmp_path / "t.txt"
    text.write_text("some text " * 2000)
    for options in ({"method": "gptq"}, {}):
        with pytest.raises(UsageError, match="standard output has no such place"):
            quantcli.quantize(mini, "-", type="Q4_0", calibrate=text, **options)
    assert pipe.close() == b""


def test_a_terminal_and_json_are_refused(mini, monkeypatch):
    reader, writer = os.openpty()
    monkeypatch.setattr(stream, "_DESCRIPTOR", writer)
    with pytest.raises(OutputError, match="is a terminal"):
        quantcli.quantize(mini, "-", type="Q4_0")
    os.close(reader)
    os.close(writer)
    done = _stdout("quantize", mini, "--type", "Q4_0", "-o", "-", "--json")
    assert done.returncode == 2
    assert b"--json needs a file" in done.stderr


def test_a_dry_run_shows_the_plan(mini):
    done = _stdout("quantize", mini, "--type", "Q4_0", "-o", "-", "--dry-run", "-q")
    assert done.returncode == 0
    assert b"blk.0.attn_q.weight" in done.stdout


def test_nothing_is_left_in_the_folder(mini, tmp_path):
    done = _stdout("quantize", mini, "--type", "Q4_0", "-o", "-", cwd=tmp_path)
    assert done.returncode == 0
    assert not list(Path(tmp_path).iterdir())
