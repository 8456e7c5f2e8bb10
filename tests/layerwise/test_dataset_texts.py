"""Data sets by their names: through the real library where it is installed, else a stand-in."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantcli.errors import MissingExtraError, SourceError
from quantcli.layerwise.dataset_texts import is_dataset
from quantcli.layerwise.texts import read_texts

ROWS = {
    "plain": {"test": [{"text": "One."}, {"text": ""}, {"text": "Two."}]},
    "chats": {"train": [{"messages": [{"role": "user", "content": "Hi!"}]}]},
    "odd": {"test": [{"body": "Three.", "n": "1"}]},
}


class _Rows(list[dict[str, Any]]):
    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def _load(name: str, config: str | None = None, *, split: str) -> _Rows:
    """What the library promises of local folders of JSON lines."""
    path = Path(name) / (config or "") / f"{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"Couldn't find any data file at {path}.\nMore lines follow.")
    return _Rows(map(json.loads, path.read_text().splitlines()))


@pytest.fixture(params=["library", "stand-in"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "library" and not find_spec("datasets"):
        pytest.skip("datasets is not installed")
    if request.param == "stand-in":
        stand_in = SimpleNamespace(
            load_dataset=_load, are_progress_bars_disabled=lambda: False,
            disable_progress_bars=lambda: None, enable_progress_bars=lambda: None,
        )  # fmt: skip
        monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for name, splits in ROWS.items():
        (tmp_path / name).mkdir()
        for split, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / name / f"{split}.jsonl").write_text(lines)
    return tmp_path


def test_rows_become_a_text(folder: Path) -> None:
    (text,) = read_texts(["plain:test"])
    assert (text.label, text.content, text.weight) == ("plain:test", "One.\n\n\n\nTwo.", None)
    (weighed,) = read_texts(["plain::test:2.5"])
    assert (weighed.content, weighed.weight) == (text.content, 2.5)
    (other,) = read_texts(["odd:test"], field="body")
    assert other.content == "Three."


def test_messages_become_conversations(folder: Path) -> None:
    (text,) = read_texts(["chats:train"])
    assert [[dict(said) for said in each] for each in text.conversations] == [
        [{"role": "user", "content": "Hi!"}]
    ]


@pytest.mark.parametrize("name", ["plain:nosuch", "nowhere:test"])
def test_what_is_not_there_is_one_sentence(folder: Path, name: str) -> None:
    with pytest.raises(SourceError, match=f"the data set {name} cannot be read: ") as caught:
        read_texts([name])
    assert "\n" not in caught.value.message
    assert "NAME:CONFIG:SPLIT" in str(caught.value.hint)


def test_a_column_that_is_not_there(folder: Path) -> None:
    with pytest.raises(SourceError, match="has no column 'text'") as caught:
        read_texts(["odd:test"])
    assert caught.value.hint == "--field names one of: body, n"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="no file wikitext:wikitext-2-raw-v1:test") as found:
        read_texts(["wikitext:wikitext-2-raw-v1:test"])
    assert found.value.hint == "pip install datasets"


@pytest.mark.parametrize("name", ["notes.txt", "notes", "C:notes.txt", "a:b:c:d", "a:", ":b"])
def test_what_is_no_name_of_a_data_set(name: str) -> None:
    assert not is_dataset(name)
