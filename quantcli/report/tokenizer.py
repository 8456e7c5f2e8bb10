"""Which kind of tokenizer a model has, in words, without reading its vocabulary.

A tokenizer.json is tens of megabytes of vocabulary and merges behind a short description; only
the text before the vocabulary is parsed, so that looking at a model stays instant. Whether the
tokenizer can be converted is another question, answered by `quantcli.vocab`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcli.whole_files import read_whole

_GGUF_KINDS = {
    "gemma4": "BPE over text",
    "gpt2": "byte-level BPE",
    "llama": "SentencePiece BPE",
    "t5": "SentencePiece unigram",
    "bert": "WordPiece",
    "rwkv": "RWKV",
    "plamo2": "PLaMo-2",
}

_MODEL = re.compile(rb'"model"\s*:\s*\{')
_VOCAB = re.compile(rb',?\s*"vocab"\s*:\s*[\[{]')


def kind_in_gguf(model: str) -> str:
    """The words for a GGUF's ``tokenizer.ggml.model``; its own name when we have none."""
    return _GGUF_KINDS.get(model, model)


def kind_in_folder(folder: Path) -> str | None:
    """The words for the tokenizer files of a checkpoint; None when there are none we can read."""
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            description = _description(read_whole(path))
        except OSError:
            return None
        if description is not None:
            return _kind(description)
    return "SentencePiece" if (folder / "tokenizer.model").is_file() else None


def _description(content: bytes) -> dict[str, Any] | None:
    """tokenizer.json without vocabulary and merges, where they come last; else the whole."""
    model = _MODEL.search(content)
    vocab = _VOCAB.search(content, model.end()) if model else None
    if vocab is not None:
        # Keys that follow the vocabulary are lost; `_kind` needs the model's type, which in all
        # files that the tokenizers library writes comes first.
        found = _object(content[: vocab.start()] + b"}}")
        if found is not None and "type" in found["model"]:
            return found
    return _object(content)


def _object(content: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("model"), dict) else None


def _kind(description: Mapping[str, Any]) -> str | None:
    model = description["model"]
    match model.get("type"):
        case "BPE":
            # SentencePiece's BPE falls back to bytes for what it lacks; GPT-2's begins with them.
            if model.get("byte_fallback"):
                return "SentencePiece BPE"
            steps = json.dumps([description.get("pre_tokenizer"), description.get("decoder")])
            return "byte-level BPE" if '"ByteLevel"' in steps else "BPE"
        case "Unigram":
            return "SentencePiece unigram"
        case str(other):
            return other
        case _:
            return None
