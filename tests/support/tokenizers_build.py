"""Small tokenizers trained on the spot with Hugging Face's library, one per structure.

The library is the oracle: what `Tokenizer.encode` gives from a folder's ``tokenizer.json`` is what
llama.cpp has to give from the key-values that are made of the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.tokenizers_text import training_text
from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
from tokenizers import pre_tokenizers as pre

SPECIAL = ("<|bos|>", "<|eos|>", "<|user|>")
ADDED = ("<tool>", "</tool>", "snake_case_word", "  two")


def split(regex: str, behavior: str = "Isolated", *, invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def byte_level(*, use_regex: bool = False, add_prefix_space: bool = False) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def digits(*, individual: bool = True) -> dict[str, Any]:
    return {"type": "Digits", "individual_digits": individual}


def sequence(*parts: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def train_byte_level(
    pre_tokenizer: Mapping[str, Any],
    *,
    size: int = 3000,
    ignore_merges: bool = False,
    normalizer: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The ``tokenizer.json`` of a byte-level BPE of ``size`` tokens with added ones after them."""
    tokenizer = Tokenizer(models.BPE())
    shell = json.loads(tokenizer.to_str())
    shell["pre_tokenizer"], shell["normalizer"] = pre_tokenizer, normalizer
    tokenizer = Tokenizer.from_str(json.dumps(shell))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    result: dict[str, Any] = json.loads(tokenizer.to_str())
    result["model"]["ignore_merges"] = ignore_merges
    return result


def add_template(
    tokenizer: dict[str, Any], *, first: Sequence[str] = (), last: Sequence[str] = ()
) -> None:
    """Give ``tokenizer`` a post-processor that puts special tokens around the text."""
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}

    def special(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    def body(name: str) -> list[dict[str, Any]]:
        return [
            *map(special, first),
            {"Sequence": {"id": name, "type_id": 0}},
            *map(special, last),
        ]

    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": body("A"),
        "pair": [*body("A"), *body("B")],
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in {*first, *last}
        },
    }


def write_folder(folder: Path, **files: Any) -> Path:
    """Write ``name=content`` as ``folder/name.json``; bytes and text go to the name as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name.replace("__", ".")).write_bytes(content)
        elif isinstance(content, str):
            (folder / name.replace("__", ".")).write_text(content)
        else:
            (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False))
    return folder


def encode_all(
    tokenizer: Mapping[str, Any], texts: Mapping[str, str], *, special: bool = False
) -> dict[str, list[int]]:
    """The ids that Hugging Face's library gives for each text."""
    library = Tokenizer.from_str(json.dumps(tokenizer))
    return {
        name: library.encode(text, add_special_tokens=special).ids for name, text in texts.items()
    }
