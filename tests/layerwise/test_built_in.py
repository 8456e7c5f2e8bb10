"""The texts that come with quantcli, and the mix that they make."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from quantcli.errors import SourceError, UsageError
from quantcli.layerwise.built_in import KINDS
from quantcli.layerwise.texts import Text, read_texts
from quantcli.layerwise.windows import Tokenizer, make_windows
from quantcli.model import open_model
from quantcli.types import MetaValue

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def _mix(*names: str) -> dict[str, Text]:
    return {text.label: text for text in read_texts(names)}


def test_the_default_is_a_mix_by_kind() -> None:
    mix = _mix("default")
    assert list(mix.values()) == read_texts([])
    assert [text.weight for text in mix.values()] == [0.6, 0.2, 0.1, 0.1]
    (prose,) = read_texts(["built-in/prose"])
    assert replace(prose, weight=0.6) == mix["built-in English prose"]


def test_weights_share_out_the_windows(mini: Path) -> None:
    """A file of weight 3 beside the mix of weight 1 gets three windows of four."""
    with open_model(mini) as model:
        tokenizer = Tokenizer(model)
        windows = make_windows(tokenizer, read_texts(["default"]), ctx=64, chunks=50)
        parts = [
            tokenizer.encode(tokenizer.render(text).content) for text in read_texts(["default"])
        ]
    assert len(windows.ids) == 50
    counts = []
    for ids in parts:
        whole = {tuple(ids[at + 1 : at + 64]) for at in range(0, len(ids) - 63, 64)}
        counts.append(sum(tuple(window[1:]) in whole for window in windows.ids))
    assert counts == [30, 10, 5, 5]
    weights = [text.weight for text in read_texts(["default:2", f"{__file__}:6"])]
    assert weights == pytest.approx([1.2, 0.4, 0.2, 0.2, 6])


def test_conversations_take_the_models_own_template() -> None:
    (chat,) = read_texts(["built-in/chat"])
    found = chat.render({"tokenizer.chat_template": MetaValue("str", TEMPLATE)})
    assert found.spelled
    assert found.content.startswith("<user>What's the difference between a list and a tuple")
    assert found.content.count("<assistant>") == sum(
        message["role"] == "assistant" for said in KINDS["chat"].conversations() for message in said
    )
    assert found.remark is None


@pytest.mark.parametrize(
    "template", [None, "{{ raise_exception('System role not supported') }}{{ messages }}"]
)
def test_without_a_template_they_are_paragraphs(template: str | None) -> None:
    keys = {} if template is None else {"tokenizer.chat_template": MetaValue("str", template)}
    (chat,) = read_texts(["built-in/chat"])
    found = chat.render(keys)
    assert not found.spelled
    assert "\n\nAssistant: Both hold items in order." in found.content
    assert found.remark is not None
    # A user's own conversations are refused there, since somebody means them as they are.
    with pytest.raises(SourceError):
        replace(chat, plain=None).render(keys)


def test_other_languages_are_other_scripts() -> None:
    (text,) = read_texts(["built-in/languages"])
    scripts = {unicodedata.name(c).split()[0] for c in text.content if c.isalpha()}
    assert {"LATIN", "CYRILLIC", "CJK", "HIRAGANA", "HANGUL", "ARABIC", "DEVANAGARI"} <= scripts


def test_a_file_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("default").write_text("a file of this name")
    assert [text.content for text in read_texts(["default"])] == ["a file of this name"]


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UsageError, match="no built-in text is called 'poems'"):
        read_texts(["built-in/poems"])
