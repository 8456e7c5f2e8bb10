"""What makes a model run: texts to calibrate and evaluate on, stored predictions, settings."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from support.fuzz import micro
from support.fuzz.byte_edits import edit_bytes, spoil_file
from support.fuzz.case import Case, Kind, command
from support.fuzz.json_edits import dump, edit_json
from support.fuzz.kinds.tokenizers import edit_tokenizer
from support.fuzz.values import odd, odd_text

_TORCH = ("torch", "transformers", "quantcli.calibration", "quantcli.evals.run",
          "quantcli.evals.engines.torch", "quantcli.layerwise.layerwise_model")  # fmt: skip
_ONE = ("--threads", "1")
_SMALL = ("--ctx", "16", "--chunks", "2", *_ONE)
_TEXTS: tuple[bytes, ...] = (
    b"",
    b" ",
    b"\n" * 3000,
    b"\0" * 3000,
    b"\xff" * 3000,
    b"\xef\xbb\xbf" + micro.TEXT.encode(),
    b"a",
    b"\r\n" * 900,
    micro.TEXT.encode("utf-16"),
    ("\u202e" + micro.TEXT).encode(),
    "🤗".encode() * 900,
    b"a" * 200_000,
    b"<|bos|><|eos|><|user|>" * 200,
    ("e" + "\u0301" * 5000).encode(),
    b"\xed\xa0\x80" * 500,
    b"\x1b[31m" * 600,
    ("\u0000\u2028\u2029\x85\x0b\x0c" * 300).encode(),
    micro.TEXT.encode()[:-1] + b"\xc3",
)
_LINES: tuple[bytes, ...] = (
    b"",
    b"{}",
    b"[]",
    b"5",
    b"null",
    b'"x"',
    b'{"text": 5}',
    b'{"text": null}',
    b'{"text": ""}',
    b'{"text": ["a"]}',
    b"{",
    b'{"text": "\\ud800"}',
    b'{"text": "a", "text": "b"}',
    b"[" * 50_000,
    b'{"text": {"text": "x"}}',
    b"NaN",
    b"1e999",
    b'{"text": "' + b"a " * 50_000 + b'"}',
    b'{"messages": [{"role": "user", "content": "x"}]}',
    b"\xff",
    b"\0",
    b'{"text": "\\u0000\\u001b[31m"}',
    b"1" * 5000,
    b'{"t\\u0065xt": "escaped key"}',
)


def _warm(folder: Path) -> Any:
    model = micro.model(folder)
    text = folder / "t.txt"
    text.write_text(micro.TEXT * 2)
    micro.run("calibrate", model, "--data", text, "-o", folder / "c.gguf", *_SMALL[:-2])
    path = micro.gguf(folder, "Q8_0")
    evaluate = ("eval-ppl", model, "--engine", "torch", "--data", text, "--ctx", "16")
    bases = {}
    for name, more in (("whole", ()), ("top", ("--top-k", "8"))):
        micro.run(*evaluate, "--chunks", "3", "--save-base", folder / name, *more)
        bases[name] = (folder / name).read_bytes()
    micro.run(*evaluate, "--base", folder / "whole")
    return {"model": model, "gguf": path, "text": text, "bases": bases, "files": micro.files()}


def _make_text(chance: Random, folder: Path, bases: Any) -> Case:
    name = chance.choice(("t.txt", "t.txt", "t.jsonl", "t.jsonl", "t.json", "t"))
    path = folder / name
    if name == "t.jsonl":
        lines = [chance.choice(_LINES) for _ in range(chance.choice((1, 3)))]
        lines += [json.dumps({"text": micro.TEXT}).encode()] * chance.choice((0, 3))
        chance.shuffle(lines)
        raw = b"\n".join(lines)
        if chance.random() < 0.2:
            edited, _ = edit_json(chance, {"text": micro.TEXT, "meta": {"a": [1]}})
            raw = edited + b"\n" + raw
    else:
        raw = chance.choice(_TEXTS)
        if chance.random() < 0.3:
            raw = edit_bytes(chance, micro.TEXT.encode() * 2)
    path.write_bytes(raw)
    what = f"{name} {raw[:30]!r}"
    if chance.random() < 0.1:
        what = spoil_file(chance, path)
    place = f"../in/{name}" + chance.choice(("",) * 8 + (":0", ":nan", ":-1", ":1e400", ":2"))
    field = (
        ("--field", chance.choice(("text", "x", "", "messages"))) if chance.random() < 0.3 else ()
    )
    commands = chance.choice(
        (
            (
                command(
                    "calibrate", bases["model"], "--data", place, *field, "-o", "c.gguf", *_SMALL
                ),
                command("inspect", "c.gguf", sound=True),
            ),
            (
                command(
                    "calibrate",
                    bases["model"],
                    "--data",
                    place,
                    *field,
                    "-o",
                    "c.dat",
                    "--legacy",
                    *_SMALL,
                ),
            ),
            (
                command(
                    "eval-ppl",
                    bases["model"],
                    "--engine",
                    "torch",
                    "--data",
                    place,
                    *field,
                    *_SMALL,
                ),
            ),
            (
                command(
                    "eval-ppl",
                    bases["model"],
                    "--engine",
                    "torch",
                    "--data",
                    place,
                    *field,
                    *_SMALL,
                    "--json",
                ),
            ),
            (
                command(
                    "quantize",
                    bases["model"],
                    "--type",
                    "Q4_0",
                    "--calibrate",
                    place,
                    "--chunks",
                    "1",
                    "-o",
                    "m.gguf",
                    *_ONE,
                ),
            ),
        )
    )
    return Case(what, commands)


def _make_base(chance: Random, folder: Path, bases: Any) -> Case:
    name = chance.choice(sorted(bases["bases"]))
    raw = bases["bases"][name]
    what = chance.choice(("bytes", "bytes", "sizes", "sizes", "tokens", "rows", "cut", "whole"))
    if what == "bytes":
        raw = edit_bytes(chance, raw, 40)
    elif what == "sizes":
        place = 8 + 4 * chance.randrange(4)
        number = chance.choice((0, -1, 1, 2, 3, 4, 17, 2**31 - 1, -(2**31), 1 << 24, 300, 15))
        raw = raw[:place] + struct.pack("<i", number) + raw[place + 4 :]
        what = f"size {place} {number}"
    elif what == "tokens":
        raw = raw[:24] + struct.pack("<i", chance.choice((-1, 2**31 - 1, 5000, 0))) + raw[28:]
    elif what == "rows":
        place = chance.randrange(220, len(raw) - 4)
        word = struct.pack("<f", chance.choice((float("nan"), float("inf"), -1e38, 1e38, 0.0)))
        raw = raw[:place] + word + raw[place + 4 :]
    elif what == "cut":
        raw = raw[: chance.randrange(len(raw))]
    path = folder / "base"
    path.write_bytes(raw)
    if chance.random() < 0.06:
        what = spoil_file(chance, path)
    data = chance.choice(((), ("--data", bases["text"])))
    more = chance.choice(
        ((), ("--json",), ("--max-kld", "0.1"), ("--ctx", "16"), ("--plot", "p.svg"))
    )
    run = (
        "eval-ppl",
        bases["model"],
        "--engine",
        "torch",
        "--base",
        "../in/base",
        *data,
        *more,
        *_ONE,
    )
    return Case(f"{name}: {what}", (command(*run),))


def _make_model(chance: Random, folder: Path, bases: Any) -> Case:
    """Settings of a model that transformers then builds."""
    parts = dict(bases["files"])
    name = chance.choice(
        ("config.json",) * 4 + ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    )
    tree = json.loads(parts[name])
    if name == "config.json" and chance.random() < 0.5:
        key = chance.choice(
            (
                *tree,
                "num_local_experts",
                "layer_types",
                "rope_scaling",
                "quantization_config",
                "auto_map",
                "torch_dtype",
                "attn_implementation",
                "text_config",
                "use_cache",
                "id2label",
            )
        )
        tree[key], what = odd(chance), key
        parts[name] = dump(tree).encode("utf-8", "surrogatepass")
        what = f"{key} {str(tree[key])[:40]!r}"
    elif name == "tokenizer.json" and chance.random() < 0.7:
        what = edit_tokenizer(chance, tree)
        parts[name] = dump(tree).encode("utf-8", "surrogatepass")
    else:
        parts[name], what = edit_json(chance, tree)
    micro.write(folder / "m", parts)
    commands = chance.choice(
        (
            command("calibrate", "../in/m", "--data", bases["text"], "-o", "c.gguf", *_SMALL),
            command(
                "calibrate",
                "../in/m",
                "--data",
                bases["text"],
                "-o",
                "c.gguf",
                "--collect",
                "hessian",
                *_SMALL,
            ),
            command("eval-ppl", "../in/m", "--engine", "torch", "--data", bases["text"], *_SMALL),
            command(
                "quantize",
                "../in/m",
                "--type",
                "Q4_0",
                "--method",
                "gptq",
                "--calibrate",
                bases["text"],
                "--chunks",
                "1",
                "--fisher-windows",
                "0",
                "-o",
                "m.gguf",
                *_ONE,
            ),
        )
    )
    return Case(f"{name}: {what}", (commands,))


_WORDS = (
    "0",
    "1",
    "-1",
    "2",
    "3",
    "16",
    "99999999999999999999",
    "nan",
    "",
    "1e9",
    "x,y",
    "../in",
    "1K",
    "0.5",
)
_CALIBRATE: dict[str, tuple[str, ...]] = {
    "--ctx": ("8", "16"),
    "--chunks": ("1", "2"),
    "--seed": ("3",),
    "--collect": ("hessian", "abs_max,mean_abs"),
    "--dtype": ("float32", "bfloat16"),
    "--device": ("cpu",),
    "--max-memory": ("1G", "1K"),
    "--pre": ("qwen2",),
    "--field": ("text",),
}
_EVALUATE: dict[str, tuple[str, ...]] = {
    "--ctx": ("16",),
    "--stride": ("8", "16"),
    "--chunks": ("1", "2"),
    "--top-k": ("4",),
    "--save-base": ("b",),
    "--max-ppl": ("1e9", "1"),
    "--max-kld": ("1",),
    "--max-kld99": ("1",),
    "--max-kld999": ("1",),
    "--max-ppl-ratio": ("1.5",),
    "--min-top1": ("0.5",),
    "--engine": ("torch",),
    "--config": ("../in",),
    "--plot": ("p.svg",),
    "--reference": ("x",),
    "--base": ("x",),
}


def _make_options(chance: Random, folder: Path, bases: Any) -> Case:
    """Options of the commands that run a model."""
    own = chance.random() < 0.5
    table = _CALIBRATE if own else _EVALUATE
    args: list[Any] = []
    for name in chance.sample(sorted(table), chance.choice((1, 2, 3))):
        sound = chance.random() < 0.5
        word = chance.choice(table[name]) if sound else chance.choice((*_WORDS, odd_text(chance)))
        args += [name, word.replace("\0", "").replace("\ud800", "")]
    start = ("calibrate", bases["model"], "-o", "c.gguf") if own else ("eval-ppl", bases["model"])
    if "--ctx" not in args:
        args += ["--ctx", "16"]
    what = " ".join(str(a)[:30] for a in args)
    return Case(what, (command(*start, "--data", bases["text"], *args, *_ONE),))


KINDS = (
    Kind("texts", _warm, _make_text, _TORCH, trials=100),
    Kind("bases", _warm, _make_base, _TORCH, trials=100),
    Kind("run-settings", _warm, _make_model, _TORCH, trials=60),
    Kind("run-options", _warm, _make_options, _TORCH, trials=60),
)
