"""The tokenizer's files of a folder, in whichever form they are.

``tokenizer.json`` decides where there is one, a SentencePiece model may stand beside it; else
tekken.json, a tiktoken file or vocab.txt (WordPiece) is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcli.errors import VocabularyError
from quantcli.vocab.files import TokenizerFiles, TokenizerJson, read_json, read_mapping


def find_files(folder: Path, config: Mapping[str, Any]) -> TokenizerFiles:
    """Read what ``folder`` has; VocabularyError where there is no tokenizer or a broken file."""
    names = ("tokenizer.model", "spiece.model")
    model = next((folder / name for name in names if (folder / name).is_file()), None)
    ranks = _tiktoken(folder, model)
    if ranks == model:
        model = None
    settings = read_mapping(folder / "tokenizer_config.json")
    path = folder / "tokenizer.json"
    tokenizer = read_json(path, TokenizerJson) if path.is_file() else None
    if tokenizer is None and (folder / "tekken.json").is_file():
        from quantcli.vocab.ranks import read_tekken, tekken_names

        tokenizer = read_tekken(folder / "tekken.json")
        settings = {**tekken_names(tokenizer), **settings}
    elif tokenizer is None and ranks is not None:
        from quantcli.vocab.ranks import read_tiktoken

        tokenizer = read_tiktoken(ranks, settings)
    elif tokenizer is None and model is None and (folder / "vocab.txt").is_file():
        from quantcli.vocab.wordpiece import read_words, word_names

        settings = {**word_names(), **settings}
        tokenizer = read_words(folder / "vocab.txt", settings)
    if tokenizer is None and model is None:
        raise _missing(folder)
    added = folder / "added_tokens.json"
    return TokenizerFiles(
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        model=model,
        tokenizer_config=settings,
        special_tokens_map=read_mapping(folder / "special_tokens_map.json"),
        generation_config=read_mapping(folder / "generation_config.json"),
        added_tokens=read_json(added, dict[str, int]) if added.is_file() else {},
    )


def _tiktoken(folder: Path, model: Path | None) -> Path | None:
    """The folder's tiktoken file; also Llama 3's, which is called tokenizer.model."""
    own = folder / "tiktoken.model"
    found = [own] if own.is_file() else sorted(folder.glob("*.tiktoken"))
    if found:
        return found[0]
    return model if model is not None and _is_tiktoken(model) else None


def _is_tiktoken(path: Path) -> bool:
    """Whether the file's first line is a base64 token and its rank."""
    with path.open("rb") as file:
        word, _, rank = file.readline(512).partition(b" ")
    return bool(word) and rank.strip().isdigit()


def _missing(folder: Path) -> VocabularyError:
    looked = "tokenizer.json, tokenizer.model, spiece.model, tekken.json, tiktoken.model, vocab.txt"
    others = [name for name in ("vocab.json", "merges.txt") if (folder / name).is_file()]
    if not others:
        return VocabularyError(
            f"{folder} has no tokenizer: looked for {looked}",
            hint="copy the tokenizer's files next to the weights",
        )
    return VocabularyError(
        f"{folder} has {', '.join(others)} but none of {looked}",
        hint="write a tokenizer.json with transformers: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    )
