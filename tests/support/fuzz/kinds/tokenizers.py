"""Tokenizers in all their forms."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from random import Random
from typing import Any

from support.fuzz import micro
from support.fuzz.byte_edits import edit_bytes
from support.fuzz.case import Case, Kind, command
from support.fuzz.json_edits import dump, edit_json
from support.fuzz.values import odd_text

_REGEXES = (
    "((a+)+)+$",
    "(a|a)*$",
    "(?:(?:x*)*)*y",
    "(",
    "[",
    "(?<=a+)b",
    r"\p{Nonsense}",
    "a{99999999}",
    "(" * 500 + ")" * 500,
    "a" * 50_000,
    "(?R)",
    r"\1",
    "",
    "(?i:",
    "[^\\x00-\\U0010FFFF]",
    ".*" * 30,
    "(((((((((a{30}){30}){30}){30}){30}){30})))))",
    "\x00",
    "(?=" * 50 + "a" + ")" * 50,
    "🤗{2,1}",
)
_NORMALIZERS: tuple[Any, ...] = (
    {"type": "NFC"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    {"type": "Replace", "pattern": {"Regex": "((a+)+)+$"}, "content": ""},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 40).decode()},
    {"type": "BertNormalizer", "clean_text": True, "lowercase": True, "strip_accents": None,
     "handle_chinese_chars": True},
    {"type": "Sequence", "normalizers": []}, {"type": "ByteLevel"}, {"type": "Nonsense"},
)  # fmt: skip


def sentencepiece_tokenizers() -> dict[str, bytes]:
    """tokenizer.model of both kinds, trained on the spot."""
    import sentencepiece

    def train(kind: str, size: int, *, byte_fallback: bool) -> bytes:
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(micro.TEXT.split(". ")), model_writer=out, model_type=kind,
            vocab_size=size, byte_fallback=byte_fallback, hard_vocab_limit=False, minloglevel=3,
            num_threads=1,
        )  # fmt: skip
        return out.getvalue()

    return {
        "bpe": train("bpe", 320, byte_fallback=True),
        "unigram": train("unigram", 60, byte_fallback=False),
    }


def _warm(_: Path) -> Any:
    from support.tokenizers_spm import bpe_json, unigram_json

    models = sentencepiece_tokenizers()
    tree = micro.tokenizer_tree()
    order = sorted(tree["model"]["vocab"], key=tree["model"]["vocab"].__getitem__)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghij",
        *(f"##{c}" for c in "abcd"),
    ]
    ranks = [bytes([number]) for number in range(256)] + [b"th", b"he", b"the", b" t"]
    tekken = {
        "config": {
            "pattern": "\\p{L}+|\\p{N}|\\s+",
            "default_vocab_size": 270,
            "version": "v3",
            "default_num_special_tokens": 10,
            "num_vocab_tokens": 260,
        },
        "vocab": [
            {
                "rank": rank,
                "token_bytes": base64.b64encode(token).decode(),
                "token_str": token.decode("latin-1"),
            }
            for rank, token in enumerate(ranks)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": f"<s{rank}>", "is_control": True} for rank in range(10)
        ],
    }
    tiktoken = b"".join(
        base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)
    )
    return {
        "files": micro.files(),
        "json": {
            "bytes": tree,
            "bpe": bpe_json(models["bpe"], pre_tokenizer=None),
            "unigram": unigram_json(models["unigram"]),
        },
        "models": models,
        "tekken": tekken,
        "tiktoken": tiktoken,
        "words": "\n".join(words).encode() + b"\n",
        "order": order,
    }


def _place(folder: Path, bases: Any, rows: int | None = None, **parts: bytes) -> None:
    """The checkpoint with ``parts`` in place of its tokenizer; ``rows`` of embeddings said."""
    kept = dict(bases["files"])
    if "tokenizer__json" not in parts:
        kept.pop("tokenizer.json")
    kept |= {name.replace("__", "."): raw for name, raw in parts.items()}
    if rows is not None:
        kept["config.json"] = json.dumps({**micro.config(), "vocab_size": rows}).encode()
    micro.write(folder / "m", kept)


def edit_tokenizer(chance: Random, tree: dict[str, Any]) -> str:
    """A change of a tokenizer.json that only its own kind of file has."""
    what = chance.choice(
        ("regex", "regex", "normalizer", "pre", "merges", "ids", "added", "post", "vocab", "same")
    )
    if what == "regex":
        pattern = {"Regex": chance.choice(_REGEXES)}
        tree["pre_tokenizer"] = {
            "type": "Split",
            "pattern": pattern,
            "behavior": "Isolated",
            "invert": False,
        }
        if chance.random() < 0.6:
            last = {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            }
            tree["pre_tokenizer"] = {
                "type": "Sequence",
                "pretokenizers": [tree["pre_tokenizer"], last],
            }
    elif what == "normalizer":
        parts = chance.sample(_NORMALIZERS, chance.choice((1, 2, 3)))
        tree["normalizer"] = (
            parts[0] if len(parts) == 1 else {"type": "Sequence", "normalizers": parts}
        )
    elif what == "pre":
        parts = [
            chance.choice(
                (
                    {"type": "Whitespace"},
                    {"type": "Digits", "individual_digits": True},
                    {
                        "type": "Metaspace",
                        "replacement": odd_text(chance),
                        "prepend_scheme": "first",
                    },
                    {"type": "Punctuation", "behavior": odd_text(chance)},
                    {"type": "FixedLength", "length": 0},
                    {"type": "BertPreTokenizer"},
                    {"type": "CharDelimiterSplit", "delimiter": ""},
                )
            )
            for _ in range(3)
        ]
        tree["pre_tokenizer"] = chance.choice(
            (parts[0], {"type": "Sequence", "pretokenizers": parts}, None)
        )
    elif what == "merges" and tree["model"].get("merges"):
        merges = tree["model"]["merges"]
        merges[chance.randrange(len(merges))] = chance.choice(
            (
                "a b c",
                "",
                "ab",
                "zz zz",
                ["a"],
                ["", ""],
                ["a", "b", "c"],
                [1, 2],
                None,
                "a\0 b",
                ["x y", "z"],
            )
        )
        if chance.random() < 0.3:
            merges += merges
    elif what == "ids" and isinstance(tree["model"]["vocab"], dict):
        key = chance.choice(list(tree["model"]["vocab"]))
        tree["model"]["vocab"][key] = chance.choice(
            (-1, 2**31, 2**40, 10**9, 0, 5000, 2**63, 1.5, "3")
        )
    elif what == "added":
        tree["added_tokens"].append(
            {
                "id": chance.choice((-1, 0, 2**31, 10**9, 300, 299, 1.0)),
                "content": odd_text(chance),
                "special": chance.choice((True, False, None)),
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        )
    elif what == "post":
        tree["post_processor"] = chance.choice(
            (
                {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                },
                {
                    "type": "TemplateProcessing",
                    "single": [],
                    "pair": [],
                    "special_tokens": {"a": {"ids": [2**40]}},
                },
                {"type": "BertProcessing", "sep": ["[SEP]", -1], "cls": ["[CLS]"]},
                {"type": "RobertaProcessing", "sep": "x", "cls": 5},
                {"type": "Sequence", "processors": [{"type": "Sequence", "processors": []}] * 3},
            )
        )
    elif what == "vocab":
        tree["model"]["vocab"] = chance.choice(
            (
                {},
                [],
                [["a", 0.0]],
                [["a"]],
                {"": 0},
                None,
                [["a", "b"]],
                5,
                {odd_text(chance): 0},
                [[odd_text(chance), float(10**30)]],
            )
        )
    elif isinstance(tree["model"]["vocab"], dict):
        tree["model"]["vocab"] = dict.fromkeys(tree["model"]["vocab"], 0)
    return what


def _edited(chance: Random, tree: dict[str, Any]) -> tuple[bytes, str]:
    if chance.random() < 0.45:
        tree = json.loads(json.dumps(tree))
        what = edit_tokenizer(chance, tree)
        return dump(tree).encode("utf-8", "surrogatepass"), what
    return edit_json(chance, tree)


def _make_json(chance: Random, folder: Path, bases: Any) -> Case:
    name = chance.choice(("bytes", "bytes", "bpe", "unigram"))
    raw, what = _edited(chance, bases["json"][name])
    parts = {"tokenizer__json": raw}
    if chance.random() < 0.15:
        parts["special_tokens_map__json"], more = edit_json(
            chance, {"bos_token": "<|bos|>", "additional_special_tokens": ["<|user|>"]}
        )
        what += f"; map {more}"
    if chance.random() < 0.1:
        parts["added_tokens__json"], more = edit_json(chance, {"<x>": 291, "<y>": 292})
        what += f"; added {more}"
    _place(folder, bases, None if name == "bytes" else 512, **parts)
    extra = (
        ("--pre", chance.choice(("qwen2", "nonsense", "gpt-2"))) if chance.random() < 0.2 else ()
    )
    commands = (
        (command("quantize", "../in/m", "--dry-run", *extra),)
        if extra
        else micro.checkpoint_commands(chance, "m")
    )
    return Case(f"{name}: {what}", commands)


def _protobuf(chance: Random, raw: bytes) -> tuple[bytes, str]:
    """Edits of a SentencePiece model that keep its nesting half sound."""
    what = chance.choice(("bytes", "bytes", "wire", "nested", "repeat", "length", "cut", "varint"))
    if what == "wire":
        at = chance.randrange(len(raw))
        return raw[:at] + bytes([chance.randrange(8) | chance.randrange(16) << 3]) + raw[
            at + 1 :
        ], what
    if what == "nested":
        for _ in range(chance.choice((3, 300))):
            raw = b"\x0a" + _varint(len(raw)) + raw
        return raw[: 1 << 20], what
    if what == "repeat":
        return raw * chance.choice((2, 20)), what
    if what == "length":
        return raw + b"\x0a" + _varint(chance.choice((2**31, 2**63, 2**64 - 1, 5))) + b"x", what
    if what == "cut":
        return raw[: chance.randrange(len(raw))], what
    if what == "varint":
        return raw + b"\x18" + b"\xff" * chance.choice((9, 10, 11, 5000)), what
    return edit_bytes(chance, raw), what


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _make_model(chance: Random, folder: Path, bases: Any) -> Case:
    name = chance.choice(sorted(bases["models"]))
    raw, what = _protobuf(chance, bases["models"][name])
    file = chance.choice(("tokenizer__model", "spiece__model"))
    parts = {file: raw}
    if chance.random() < 0.2:
        parts["tokenizer__json"] = dump(bases["json"][name]).encode()
    _place(folder, bases, 512, **parts)
    return Case(f"{file} {name}: {what}", micro.checkpoint_commands(chance, "m"))


def _make_ranks(chance: Random, folder: Path, bases: Any) -> Case:
    what = chance.choice(("tekken", "tekken", "tiktoken", "words", "merges"))
    parts: dict[str, bytes] = {}
    if what == "tekken":
        tree = json.loads(json.dumps(bases["tekken"]))
        if chance.random() < 0.4:
            tree["config"]["pattern"] = chance.choice(_REGEXES)
        parts["tekken__json"], done = edit_json(chance, tree)
    elif what == "tiktoken":
        lines = bases["tiktoken"].splitlines()
        at = chance.randrange(len(lines))
        lines[at] = chance.choice(
            (
                b"",
                b"x",
                b"!! 5",
                b"YQ== -1",
                b"YQ== 99999999999999999999",
                lines[0],
                b"YQ== 1.5",
                b"YQ==  5 6",
                b"\xff 3",
                b"= 4",
                b"YQ== " + b"9" * 5000,
            )
        )
        parts[chance.choice(("tiktoken__model", "qwen__tiktoken", "tokenizer__model"))] = (
            b"\n".join(lines)
        )
        done = str(lines[at][:20])
    elif what == "words":
        raw = bases["words"]
        parts["vocab__txt"] = chance.choice(
            (
                edit_bytes(chance, raw),
                raw * 3,
                raw.replace(b"\n", b"\r\n"),
                b"",
                b"\n" * 5000,
                raw + b"\xff\n",
                raw.replace(b"[UNK]", b""),
                b"\0".join(raw.splitlines()),
            )
        )
        done = "vocab.txt"
    else:
        tree = bases["json"]["bytes"]["model"]
        parts["vocab__json"], done = edit_json(chance, tree["vocab"])
        merges = "\n".join(
            m if isinstance(m, str) else " ".join(m) for m in tree["merges"]
        ).encode()
        parts["merges__txt"] = edit_bytes(chance, b"#version: 0.2\n" + merges)
    _place(folder, bases, 300, **parts)
    return Case(f"{what}: {done}", micro.checkpoint_commands(chance, "m", light=True))


KINDS = (
    Kind("tokenizer.json", _warm, _make_json),
    Kind("sentencepiece", _warm, _make_model),
    Kind("ranks", _warm, _make_ranks),
)
