"""What is read beside a checkpoint for its towers: the processor's settings, added tokens' ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantcli.errors import SourceError
from quantcli.sources.processor import find_added_token, read_processor


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def test_the_later_file_and_its_parts_win(tmp_path: Path) -> None:
    assert read_processor(tmp_path) == {}
    write(tmp_path, "preprocessor_config.json", {"image_mean": [1], "size": 3, "min_pixels": 4})
    write(tmp_path, "processor_config.json", {"image_processor": {"size": 5}, "image_mean": [2]})
    found = read_processor(tmp_path)
    assert (found["image_mean"], found["size"], found["min_pixels"]) == ([2], 5, 4)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(SourceError, match="is not JSON"):
        read_processor(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"added_tokens": [7, {}, {"id": 12, "content": "[IMG_BREAK]"}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"12": {"content": "[IMG_BREAK]"}}}),
        ("tekken.json", {"special_tokens": [{"rank": 12, "token_str": "[IMG_BREAK]"}]}),
    ],
)
def test_an_added_token_is_found_in_any_file(name: str, content: Any, tmp_path: Path) -> None:
    write(tmp_path, "tokenizer.json", {"added_tokens": None})
    write(tmp_path, name, content)
    assert find_added_token(tmp_path, "[IMG_BREAK]") == 12
    assert find_added_token(tmp_path, "[IMG]") is None


def test_an_id_that_is_none_is_no_token(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer.json", {"added_tokens": [{"id": None, "content": "x"}]})
    assert find_added_token(tmp_path, "x") is None
