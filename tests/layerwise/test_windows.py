"""Texts become the windows that llama.cpp would cut, or are refused in a sentence."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from quantcli.errors import QuantcliError, UsageError, VocabularyError
from quantcli.layerwise import texts
from quantcli.layerwise.texts import Text, read_texts
from quantcli.layerwise.windows import Tokenizer, cut, make_windows
from quantcli.model import open_model

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"
PROSE = "It was the best of times, it was the worst of times. "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with open_model(MINI) as model:
        return Tokenizer(model)


def test_ids_are_those_of_llama_cpp(tokenizer: Tokenizer, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    from quantcli.artifacts.gguf_file import prepare_gguf
    from quantcli.artifacts.write import write_artifact
    from quantcli.plan.recipe import Recipe

    path = tmp_path / "mini.gguf"
    with open_model(MINI) as model:
        for _ in write_artifact(prepare_gguf(model, Recipe(type="Q8_0"), path)):
            pass
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    text = PROSE * 3 + "\n\n<|end_of_text|> naïve — 東京\r\n"
    wanted = llama.tokenize(text.encode(), add_bos=True, special=False)
    llama.close()
    assert tokenizer.encode(text).tolist() == wanted


def test_a_rest_is_dropped_and_bos_leads_every_window() -> None:
    windows = cut(np.arange(10, 45, dtype=np.int32), 16, bos=0)
    assert windows.tolist() == [[0, *range(11, 26)], [0, *range(27, 42)]]
    assert cut(np.arange(32, dtype=np.int32), 16, bos=None)[1, 0] == 16


def test_chunks_are_the_first_or_chosen_by_seed(tokenizer: Tokenizer) -> None:
    text = [Text("prose", " ".join(str(n) for n in range(2000)))]
    every = make_windows(tokenizer, text, ctx=64).ids.tolist()
    first = make_windows(tokenizer, text, ctx=64, chunks=5)
    assert first.ids.tolist() == every[:5]
    assert first.available == len(every)
    chosen = [
        make_windows(tokenizer, text, ctx=64, chunks=5, seed=s).ids.tolist() for s in (1, 1, 2)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] != every[:5]
    assert all(window in every for window in chosen[0])


def test_weights_share_out_the_windows(tokenizer: Tokenizer) -> None:
    long, short = PROSE * 400, "Call me Ishmael. " * 400
    counts = {}
    for label, chunks in (("all", None), ("eight", 8)):
        texts = [Text("long", long, 3.0), Text("short", short, 1.0)]
        ids = make_windows(tokenizer, texts, ctx=64, chunks=chunks).ids
        ishmael = make_windows(tokenizer, [Text("short", short)], ctx=64).ids
        mine = sum(bool((window == ishmael).all(axis=1).any()) for window in ids)
        counts[label] = (len(ids) - mine, mine)
    assert counts["eight"] == (6, 2)
    assert counts["all"][0] == pytest.approx(3 * counts["all"][1], abs=2)


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [{"text": "one\u2028line"}, {"text": "two", "more": 3}]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    assert read_texts([str(path)])[0].content == "one\u2028line\n\ntwo"
    path.write_text('{"body": "x"}\n')
    assert read_texts([str(path)], field="body")[0].content == "x"


def test_standard_input_and_names_with_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"a\r\nb\n\n")
    remark = f"{path} has 1 line ends of Windows (CRLF), which are read as newlines"
    assert read_texts([f"{path}:2.5"])[0] == Text(str(path), "a\nb\n", 2.5, remark)
    path.with_suffix(".jsonl").write_bytes(b'{"text": "a\\r\\nb"}\r\n')
    assert read_texts([str(path.with_suffix(".jsonl"))])[0].content == "a\r\nb"
    odd = tmp_path / "t.txt:2"
    odd.write_text("odd")
    assert read_texts([str(odd)])[0] == Text(str(odd), "odd")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"from a pipe\n")))
    assert read_texts(["-"])[0] == Text("standard input", "from a pipe")


def test_the_default_text_is_enough(tokenizer: Tokenizer) -> None:
    windows = make_windows(tokenizer, read_texts([]))
    assert len(windows.ids) > 40


BROKEN = {
    "empty": (b" \n", "is empty"),
    "latin": ("caf\u00e9".encode("latin-1"), "is not UTF-8: byte 0xe9 at offset 3"),
    "text.jsonl": (b'{"text": "a"}\n{"text": \n', r"line 2: is not JSON"),
    "list.jsonl": (b"[1]\n", "line 1: is not a JSON object"),
    "field.jsonl": (b'{"body": "a"}\n', "line 1: has no text under 'text'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_texts_are_refused(name: str, tmp_path: Path) -> None:
    raw, said = BROKEN[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(QuantcliError, match=said):
        read_texts([str(tmp_path / name)])


def test_wrong_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("x")
    with pytest.raises(QuantcliError, match="there is no such file"):
        read_texts([str(tmp_path / "nothing.txt")])
    with pytest.raises(QuantcliError, match="is a folder"):
        read_texts([str(tmp_path)])
    with pytest.raises(UsageError, match="has no weight"):
        read_texts([f"{path}:2", str(path)])
    with pytest.raises(UsageError, match="is not a positive number"):
        read_texts([f"{path}:-1"])
    with pytest.raises(UsageError, match="only once"):
        read_texts(["-", "-"])
    with pytest.raises(UsageError, match="is plain text"):
        read_texts([str(path)], field="text")


def test_too_short_a_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(QuantcliError, match=r"prose is too short: \d+ tokens, but two windows"):
        make_windows(tokenizer, [Text("prose", PROSE * 40)], ctx=512)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with open_model(MINI) as model:
        tokenizer = Tokenizer(model)
    tokenizer.vocabulary = 300
    with pytest.raises(VocabularyError, match="but the model has 300 tokens"):
        tokenizer.encode(PROSE)


def test_a_fifo_that_nobody_writes_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_WRITER_SECONDS", 0.2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(QuantcliError, match="pipe is a FIFO that nobody writes to"):
        read_texts([str(tmp_path / "pipe")])


@pytest.mark.parametrize("delay", [0.0, 0.2])
def test_a_fifo_is_read_to_its_end(tmp_path: Path, delay: float) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    long = PROSE * 5000

    def write() -> None:
        time.sleep(delay)
        with pipe.open("w") as file:
            time.sleep(delay)
            file.write(long)

    writer = threading.Thread(target=write)
    writer.start()
    assert read_texts([str(pipe)])[0].content == long
    writer.join()


def test_a_device_without_end_is_refused() -> None:
    with pytest.raises(QuantcliError, match="/dev/zero is no file of text"):
        read_texts(["/dev/zero"])
