"""Conversations as texts: what transformers' own chat templating gives, in every engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from quantcli.cli.app import run as run_here
from quantcli.errors import MissingExtraError, SourceError
from quantcli.evals.artifacts import open_artifact
from quantcli.layerwise.texts import read_texts
from quantcli.layerwise.windows import Tokenizer
from quantcli.model import open_model

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
)
WORDS = ("Who wrote it? ", "A lady, I believe; it is <|end|> said so.", "Of what town?", "None.")
CHATS = [
    [{"role": ("user", "assistant")[i % 2], "content": words} for i, words in enumerate(WORDS)],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Well?"}],
]


@pytest.fixture(scope="module")
def model(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a chat template, whose marks are special tokens of its own."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(mini, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    # Tokens that text hardly has give up their places, so that the embedding need not grow.
    names = sorted(vocabulary, key=lambda name: vocabulary[name])[-4:]
    merged = {f"{a}{b}" for a, b in tokenizer["model"]["merges"]}
    assert set(names) <= merged
    marks = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    places = {mark: vocabulary.pop(name) for mark, name in zip(marks, names, strict=True)}
    tokenizer["model"]["merges"] = [
        pair for pair in tokenizer["model"]["merges"] if "".join(pair) not in names
    ]
    like = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [
        like | {"id": place, "content": mark, "special": True} for mark, place in places.items()
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def lines(path: Path, chats: list[list[dict[str, str]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def wanted_ids(model: Path) -> list[int]:
    oracle = transformers.AutoTokenizer.from_pretrained(model)
    found: list[int] = []
    for chat in CHATS:
        found += oracle.apply_chat_template(chat, tokenize=True, return_dict=False)
    return found


def test_token_ids_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    (text,) = read_texts([str(lines(tmp_path / "chat.jsonl", CHATS))])
    with open_model(model) as opened:
        made = Tokenizer(opened)
        ids = made.encode(made.render(text).content, spelled=True)
    oracle = transformers.AutoTokenizer.from_pretrained(model)
    assert ids.tolist() == wanted_ids(model)
    assert oracle.convert_tokens_to_ids("<|end|>") in ids


def test_llama_cpp_reads_the_same(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from quantcli.evals.agreement import Loaded, common_tokens

    assert (
        run_here(["quantize", str(model), "--bits", "8", "-q", "-o", str(tmp_path / "q.gguf")]) == 0
    )
    (text,) = read_texts([str(lines(tmp_path / "chat.jsonl", CHATS))])
    loaded = []
    for path, engine in ((tmp_path / "q.gguf", "llama.cpp"), (model, "torch")):
        artifact = open_artifact(str(path), engine=engine)
        loaded.append(Loaded(artifact, artifact.load(64, 1)))
    # Both read the template and its tokens for themselves, and must agree.
    tokens = common_tokens(loaded, text, None, 64)
    for each in loaded:
        each.engine.close()
        each.artifact.model.store.close()
    np.testing.assert_array_equal(tokens, wanted_ids(model))


def test_conversations_calibrate(model: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "chat.jsonl", CHATS * 30)
    output = tmp_path / "chat.gguf"
    command = ["calibrate", str(model), "--data", str(data), "--ctx", "64", "-q", "-o", str(output)]
    assert run_here(command) == 0
    assert output.is_file()


def test_what_cannot_be_a_conversation_is_named(model: Path, mini: Path, tmp_path: Path) -> None:
    (text,) = read_texts([str(lines(tmp_path / "plain.jsonl", CHATS))])
    with open_model(mini) as opened, pytest.raises(SourceError, match="has no chat template"):
        Tokenizer(opened).render(text)
    tool = [*CHATS, [{"role": "tool", "content": "4"}]]
    (text,) = read_texts([str(lines(tmp_path / "tool.jsonl", tool))])
    with (
        open_model(model) as opened,
        pytest.raises(SourceError, match=r"conversation 3: .* no tools here"),
    ):
        Tokenizer(opened).render(text)
    nobody = [[{"content": "4"}]]
    with pytest.raises(SourceError, match="line 1: a message has no role"):
        read_texts([str(lines(tmp_path / "nobody.jsonl", nobody))])  # type: ignore[arg-type]
    mixed = lines(tmp_path / "mixed.jsonl", CHATS)
    mixed.write_text(mixed.read_text() + json.dumps({"text": "prose"}) + "\n")
    with pytest.raises(SourceError, match="texts and conversations"):
        read_texts([str(mixed)])


def test_an_endless_template_ends(model: Path, tmp_path: Path, monkeypatch) -> None:
    from quantcli.vocab import chat_template

    monkeypatch.setattr(chat_template, "_SECONDS", 2.0)
    (text,) = read_texts([str(lines(tmp_path / "chat.jsonl", CHATS))])
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with open_model(model) as opened:
        metadata = dict(opened.metadata)
        kind = type(metadata["tokenizer.chat_template"])
        metadata["tokenizer.chat_template"] = kind("str", endless)
        with pytest.raises(SourceError, match="more time or memory"):
            text.render(metadata)


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = pyarrow.table({"text": ["one page", "another"], "said": CHATS, "n": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_texts([str(tmp_path / "a.parquet")])[0].content == "one page\n\nanother"
    (text,) = read_texts([str(tmp_path / "a.parquet")], field="said")
    assert [list(chat) for chat in text.conversations] == CHATS
    with pytest.raises(SourceError, match="no column 'words'"):
        read_texts([str(tmp_path / "a.parquet")], field="words")
    with pytest.raises(SourceError, match="row 1: holds neither"):
        read_texts([str(tmp_path / "a.parquet")], field="n")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(SourceError, match="is not a Parquet file"):
        read_texts([str(tmp_path / "b.parquet")])


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match="needs pyarrow"):
        read_texts([str(tmp_path / "a.parquet")])


def test_the_built_in_text_is_for_a_first_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = read_texts(["built-in"])
    assert text.content == read_texts([])[0].content
    assert len(read_texts([])) == 4
    assert text.remark is not None
    assert "not for a figure to publish" in text.remark
    Path("built-in").write_text("a file of this name")
    assert read_texts(["built-in"])[0].content == "a file of this name"
