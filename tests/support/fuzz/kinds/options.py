"""Options of the command line."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from support.fuzz import micro
from support.fuzz.case import Case, Kind, command
from support.fuzz.kinds.recipes import METHODS
from support.fuzz.values import odd_text

_OPTIONS = (
    "--bits",
    "--type",
    "--tensor-type",
    "--output-tensor-type",
    "--token-embedding-type",
    "--keep",
    "--to",
    "--group-size",
    "--range",
    "--dtype",
    "--activations",
    "--scheme",
    "--split-max-size",
    "--ignore-tensor",
    "--override-kv",
    "--pre",
    "--method",
    "--damping",
    "--sweeps",
    "--target-size",
    "--max-memory",
    "--threads",
    "--chunks",
    "--imatrix",
    "--include-weights",
    "--chat-template",
    "--fisher-windows",
    "--random-share",
    "--sample-share",
    "--tune-steps",
    "--e2e-steps",
    "--quality",
    "--column-order",
    "--mmproj-type",
    "--on-fallback",
    "--calibrate",
)
_WORDS = (
    "Q4_0",
    "Q4_K_M",
    "attn=Q6_K",
    "((a+)+)+$=Q4_0",
    "(=Q4_0",
    "re:.*=W4A16",
    "first,last=Q8_0",
    "4G",
    "0",
    "-1",
    "1e400",
    "99999999999999999999",
    "nan",
    "inf",
    "1e-320",
    "0x10",
    "",
    " ",
    "=",
    "a=b=c",
    "general.name=str:@/etc/passwd",
    "x=int:5",
    "x=int:" + "9" * 400,
    "x=float:nan",
    "x=bool:maybe",
    "x=str:" + "a" * 100_000,
    "x=str:@../in/missing",
    "general.architecture=str:gpt2",
    "general.alignment=int:7",
    "general.alignment=int:0",
    "llama.block_count=int:-5",
    "*",
    "**",
    "[",
    "\\",
    "a" * 5000,
    "é",
    "\udcff",
    "channel",
    "tensor",
    "32",
    "48",
    "gptq",
    "awq,gptq",
    "gptq,gptq",
    "best",
    "W4A16",
    "NVFP4",
    "FP8_DYNAMIC",
    "int8",
    "fp8",
    "1.5",
    "split.count=int:3",
    "tokenizer.ggml.tokens=str:x",
    "0K",
    "1K",
    "1B",
    "1e3G",
    "-4G",
    "4.5.6G",
    "BF16",
    "/dev/null",
    "../in",
    "..",
)


_FITTING: dict[str, tuple[str, ...]] = {
    "--bits": ("4", "8"), "--type": ("Q4_0", "Q8_0"), "--tensor-type": ("attn=Q8_0",),
    "--output-tensor-type": ("Q6_K",), "--token-embedding-type": ("Q4_0",),
    "--keep": ("first=Q8_0",),
    "--split-max-size": ("60K", "1M"), "--ignore-tensor": ("nothing",), "--pre": ("llama-bpe",),
    "--override-kv": ("general.name=str:x",), "--target-size": ("500K",), "--max-memory": ("1G",),
    "--threads": ("1",), "--include-weights": ("attn",), "--on-fallback": ("warn",),
    "--dtype": ("F16",),
    "--to": ("gptq", "mlx", "hf"), "--group-size": ("32",), "--range": ("mse", "minmax"),
}  # fmt: skip
"""Values that the options take, alone or with some others."""


def _make_options(chance: Random, folder: Path, model: Any) -> Case:
    args: list[str] = []
    for name in chance.sample(_OPTIONS, chance.choice((1, 1, 2, 3))):
        word = odd_text(chance) if chance.random() < 0.2 else chance.choice(_WORDS)
        if name in _FITTING and chance.random() < 0.6:
            word = chance.choice(_FITTING[name])
        word = word.replace("\0", "")
        args += [name, word.encode("utf-8", "replace").decode() if "\ud800" in word else word]
    end = chance.choice((("--dry-run",), ("--dry-run", "--json"), ("--print-recipe",), ("-o", "m")))
    return Case(
        "options " + " ".join(a[:40] for a in args), (command("quantize", model, *args, *end),)
    )


def _warm(folder: Path) -> Any:
    return micro.model(folder)


KINDS = (Kind("options", _warm, _make_options, METHODS),)
