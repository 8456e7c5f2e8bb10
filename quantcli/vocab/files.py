"""The tokenizer's files in a checkpoint folder, read and checked for their form.

``tokenizer.json`` is decoded into typed structures, so a wrong type anywhere is an error that
names the file and the place. Fields that no decision depends on are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from quantcli.errors import VocabularyError
from quantcli.whole_files import read_whole

T = TypeVar("T")

_SEQUENCES = {"normalizers", "pretokenizers", "processors"}
_DEEPEST = 50


class AddedToken(msgspec.Struct, frozen=True):
    """A token that is looked for in the text before the model runs."""

    id: int
    content: str
    special: bool = False
    normalized: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class ModelPart(msgspec.Struct, frozen=True):
    """The ``model`` of ``tokenizer.json``: BPE (``merges``) or Unigram (a list with scores)."""

    vocab: dict[str, int] | list[tuple[str, float]]
    type: str | None = None
    merges: list[str | tuple[str, str]] | None = None
    unk_token: str | None = None
    unk_id: int | None = None
    byte_fallback: bool = False
    ignore_merges: bool = False
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class TokenizerJson(msgspec.Struct, frozen=True):
    """``tokenizer.json``, as far as it decides how text becomes ids."""

    model: ModelPart
    added_tokens: list[AddedToken] | None = None
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None
    file: str = "tokenizer.json"
    """The file that it was read from."""
    pre: str | None = None
    """llama.cpp's name for how words are split, where no structure here tells."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a folder has: parsed files, and the path of ``tokenizer.model`` where there is one.

    ``config`` is the model's config.json; a file that is missing is an empty mapping. ``template``
    is a chat template in place of the folder's own.
    """

    folder: Path
    config: Mapping[str, Any]
    tokenizer: TokenizerJson | None = None
    model: Path | None = None
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    special_tokens_map: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    added_tokens: Mapping[str, int] = field(default_factory=dict)
    template: str | None = None

    def path(self, name: str) -> str:
        """``folder/name``, for messages."""
        return str(self.folder / name)


def read_json(path: Path, shape: type[T]) -> T:
    """The JSON file ``path`` as ``shape``; VocabularyError naming the file and the place."""
    try:
        found = msgspec.json.decode(read_whole(path), type=shape)
        _check_sequences(found, path)
        return found
    except msgspec.ValidationError as error:
        raise VocabularyError(f"{path} has not the form it should have: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise VocabularyError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise VocabularyError(f"{path} is nested too deeply") from error
    except OSError as error:
        raise VocabularyError(f"{path} cannot be read: {error.strerror}") from error


def _check_sequences(found: Any, path: Path) -> None:
    """VocabularyError where a part that holds parts does not hold a list of objects."""
    if not isinstance(found, TokenizerJson):
        return
    nodes = [found.normalizer, found.pre_tokenizer, found.post_processor]
    for depth in range(_DEEPEST + 1):
        inner: list[Any] = []
        for node in filter(None, nodes):
            for key in _SEQUENCES & node.keys():
                parts = node[key]
                if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
                    raise VocabularyError(
                        f"{path} has not the form it should have: {key} of a "
                        f"{node.get('type')} is no list of objects"
                    )
                inner += parts
        if not inner:
            return
        if depth == _DEEPEST:
            raise VocabularyError(f"{path} is nested too deeply: {_DEEPEST} sequences in another")
        nodes = inner


def read_mapping(path: Path) -> Mapping[str, Any]:
    """A JSON object, empty where there is no such file."""
    return read_json(path, dict[str, Any]) if path.is_file() else {}
