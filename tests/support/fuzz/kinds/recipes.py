"""Recipes in TOML and YAML, options of the command line, and other small files that users name."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from support.fuzz import micro
from support.fuzz.byte_edits import edit_bytes, spoil_file
from support.fuzz.case import Case, Kind, command
from support.fuzz.json_edits import dump, edit_json
from support.fuzz.values import odd, odd_text

_SOUND: tuple[dict[str, Any], ...] = (
    {"type": "Q4_K_M", "tensor_types": ["attn_v=Q6_K", "ffn=Q5_K"], "pure": False},
    {"type": "Q4_0", "imatrix": "none.gguf", "include_weights": ["attn"], "on_fallback": "error"},
    {"to": "gptq", "bits": 4, "group_size": 32, "symmetric": True, "keep": ["lm_head"]},
    {"to": "compressed-tensors", "scheme": ["re:.*=FP8_DYNAMIC"], "dtype": "BF16"},
    {"type": "Q4_0", "method": "gptq", "damping": 0.05, "sweeps": 1, "column_order": "natural"},
    {"type": "Q8_0", "target_size": "500K", "allocate": True, "split_max_size": "1M"},
    {"type": ["Q4_0", "Q8_0"], "outputs": [{"type": "Q4_0", "name": "a"}, {"to": "hf"}]},
    {"type": ["Q4_0", "Q8_0"], "to": ["gguf", "hf"]},
    {"bits": [4, 8], "to": ["gptq", "awq"]},
    {"outputs": [{"to": "mlx", "bits": 4, "name": "x"}, {"type": "Q8_0", "name": "y.gguf"}]},
    {"to": "mlx", "group_size": 64, "bits": 4, "override_kv": ["general.name=str:x"]},
)
_YAML = (
    "type: Q4_0\ntype: Q8_0\n",
    "type: !!python/object/apply:os.system ['id']\n",
    "type: &a [*a]\n",
    "&x {type: *x}\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "type: 2024-01-01\n",
    "type: !!binary aGk=\n",
    "type: .nan\n",
    "type: .inf\n",
    "<<: {type: Q4_0}\n",
    "<<: [1, 2]\n",
    "<<: *x\n",
    'type: "\\ud800"\n',
    'type: "\\x00"\n',
    "--- a\n--- b\n",
    "\t- x\n",
    "type: 0x" + "F" * 4000 + "\n",
    "type: 1_000\n",
    "type: 190:20:30\n",
    "type: ~\n",
    "[]\n",
    "5\n",
    "''\n",
    "%YAML 9.9\n---\n",
    "%TAG ! tag:x\n---\n!x y\n",
    "type: |\n" + "  a\n" * 2000,
    "type: " + "a" * 200_000 + "\n",
    "tensor_types:\n" + "- a=Q4_0\n" * 3000,
    "!!set {a, b}\n",
    "!!omap [a: 1]\n",
    "type: !!int x\n",
    "type: !!float x\n",
    "type: !!timestamp x\n",
    "type: !!bool x\n",
    "type: !!python/name:os.system\n",
    "type: 1" + "0" * 5000 + "\n",
    "type: 2024-99-99\n",
    "type: 2024-01-01T99:99:99Z\n",
    "\ufefftype: Q4_0\n",
    "type: Q4_0\r\nbits: 4\r\n",
    "type: !<tag:yaml.org,2002:map> []\n",
    "!!map []\n",
    "!!seq {}\n",
)
_TOML = (
    "type = 'Q4_0'\ntype = 'Q8_0'\n",
    "[type]\na = 1\n",
    "[[type]]\n",
    "a.b.c.d = 1\na.b = 2\n",
    "type = nan\n",
    "type = -inf\n",
    "type = 1979-05-27T07:32:00Z\n",
    "type = 07:32:00\n",
    "type = 0x" + "f" * 4000 + "\n",
    'type = "\\uD800"\n',
    "type = '''" + "a" * 50_000 + "'''\n",
    "type = 1" + "0" * 5000 + "\n",
    "type = [" + "[" * 2000 + "]" * 2000 + "]\n",
    "a." * 3000 + "b = 1\n",
    "type = {a = 1, a = 2}\n",
    "[" + "a." * 2000 + "b]\n",
    "= 5\n",
    '"" = 1\n',
    "type = 1e999\n",
    "type = [1, 'a', {}]\n",
    "\x00",
    "type = 2024-99-99\n",
    "tensor_types = [" + "'a=Q4_0', " * 3000 + "]\n",
    "type = 99:99:99\n",
    "# only\n",
    "bits = 4_\n",
    "bits = 0b11\n",
)


def _bomb(chance: Random) -> str:
    """Aliases that double at every line."""
    depth = chance.choice((4, 9, 30))
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 9) + "]" for n in range(1, depth)]
    last = chance.choice(("type", "tensor_types", "keep", "nonsense"))
    return "\n".join(lines[chance.choice((0, 0, 0)) :]) + f"\n{last}: *a{depth - 1}\n"


def _merged(chance: Random) -> str:
    """Merge keys that double at every line."""
    depth = chance.choice((5, 14, 24))
    lines = ["b0: &b0 {x: 1}"]
    lines += [f"b{n}: &b{n} {{<<: [*b{n - 1}, *b{n - 1}]}}" for n in range(1, depth)]
    return "\n".join(lines) + f"\ntype: *b{depth - 1}\n"


def _toml(chance: Random, tree: dict[str, Any]) -> str:
    lines = []
    for key, value in tree.items():
        if chance.random() < 0.4:
            value = odd(chance)
        try:
            lines.append(f"{key} = {dump(value).replace(chr(127), '')}")
        except (TypeError, ValueError):
            lines.append(f"{key} = 1")
    return "\n".join(lines) + "\n"


def _warm(folder: Path) -> Any:
    return micro.model(folder)


def _make(chance: Random, folder: Path, model: Any) -> Case:
    suffix = chance.choice((".yaml", ".yaml", ".toml", ".yml", ".toml", ".json", ""))
    what = chance.choice(
        ("table", "table", "edit", "edit", "edit", "bomb", "many", "bytes", "field")
    )
    tree = dict(chance.choice(_SOUND))
    if what == "table":
        text = chance.choice(_TOML if suffix == ".toml" else _YAML)
        raw = text.encode("utf-8", "surrogatepass")
    elif what == "bomb":
        raw = chance.choice((_bomb, _merged))(chance).encode()
    elif what == "many":
        count = chance.choice((1000, 30_000))
        form = "x{} = 1\n" if suffix == ".toml" else "x{}: 1\n"
        raw = "".join(form.format(number) for number in range(count)).encode()
    elif what == "bytes":
        raw = edit_bytes(chance, json.dumps(tree).encode())
    else:
        if what == "field":
            from quantcli.plan.recipe import Recipe

            tree[chance.choice(list(Recipe.__dataclass_fields__))] = odd(chance)
        if suffix == ".toml":
            raw = _toml(chance, tree).encode("utf-8", "surrogatepass")
        else:
            raw, done = edit_json(chance, tree)
            what = done
    path = folder / f"r{suffix}"
    path.write_bytes(raw)
    if chance.random() < 0.02:
        what = spoil_file(chance, path)
    end = chance.choice((("--dry-run",), ("--print-recipe",), ("-o", "m", "--threads", "1")))
    return Case(
        f"r{suffix}: {what}", (command("quantize", model, "--recipe", f"../in/r{suffix}", *end),)
    )


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


def _make_options(chance: Random, folder: Path, model: Any) -> Case:
    args: list[str] = []
    for _ in range(chance.choice((1, 1, 2, 3))):
        word = (
            chance.choice(_WORDS) if chance.random() < 0.8 else odd_text(chance).replace("\0", "")
        )
        word = word.encode("utf-8", "replace").decode() if "\ud800" in word else word
        args += [chance.choice(_OPTIONS), word]
    end = chance.choice((("--dry-run",), ("--dry-run", "--json"), ("--print-recipe",), ("-o", "m")))
    return Case(
        "options " + " ".join(a[:40] for a in args), (command("quantize", model, *args, *end),)
    )


_CARDS = (
    "---\nlicense: [mit, {a: b}]\n---\n",
    '---\nlicense: "\\ud800"\n---\n',
    "---\n- a\n---\n",
    "---\n5\n---\n",
    "---\n---\n",
    "---\n",
    "---\nbase_model: ../../x\ntags: 5\n---\n",
    "---\nbase_model:\n- a/b\n- 5\n- {x: y}\n---\n",
    "---\nlanguage: {a: [b]}\n---\n",
    "---\ntags: [no, yes, 1.5, 2024-01-01, ~]\n---\n# x\n<script>a</script>[x](javascript:1)\n",
    "---\nlicense: !!python/name:os.system\n---\n",
    '---\nlicense_link: javascript:x\nlicense_name: "a\\nb"\n---\n',
    "---\nlicense: " + "x" * 100_000 + "\n---\n",
    "\xff",
    "---\r\nlicense: mit\r\n---\r\n",
    "---\nbase_model: &a [*a]\n---\n",
    "---\nlicense: 2024-99-99\n---\n",
    "---\nlicense: 1" + "0" * 5000 + "\n---\n",
    "---\nx: &a {b: *a}\nlicense: *a\n---\n",
    "---\nlicense: mit\nlicense: gpl\n---\n",
    "---\ntags:\n" + "- x\n" * 50_000 + "---\n",
    "---\ndatasets: {a: b}\nmodel_name: [1]\npipeline_tag: {}\n---\n",
)


def _make_card(chance: Random, folder: Path, model: Any) -> Case:
    place = micro.write(folder / "m", micro.files())
    what = chance.choice(("table", "table", "bomb", "bytes", "edit", "eval"))
    extra: tuple[str, ...] = ()
    if what == "eval":
        raw, what = edit_json(chance, {
            "schema": "quantcli.evaluation/1", "rows": [{"model": "m", "ppl": 5.0, "kld": 0.1}],
            "texts": [{"name": "t", "windows": 3}], "engine": "torch", "ctx": 64,
        })  # fmt: skip
        (folder / "e.json").write_bytes(raw)
        extra = ("--eval", "../in/e.json")
    elif what == "table":
        (place / "README.md").write_bytes(chance.choice(_CARDS).encode("utf-8", "surrogatepass"))
    elif what == "bomb":
        (place / "README.md").write_text(
            "---\n" + _bomb(chance).replace("type:", "license:") + "---\n"
        )
    elif what == "bytes":
        (place / "README.md").write_bytes(edit_bytes(chance, chance.choice(_CARDS[:12]).encode()))
    else:
        tree = {
            "license": "mit",
            "base_model": ["a/b"],
            "tags": ["x"],
            "language": "en",
            "datasets": ["d"],
        }
        raw, what = edit_json(chance, tree)
        (place / "README.md").write_bytes(b"---\n" + raw + b"\n---\n# x\n")
    if chance.random() < 0.03:
        what = spoil_file(chance, place / "README.md")
    first = chance.choice(
        (
            command("export", "../in/m", "--to", "card", "-o", "c.md", *extra),
            command("quantize", "../in/m", "--type", "Q8_0", "-o", "m.gguf", "--threads", "1"),
            command(
                "quantize", "../in/m", *chance.choice(micro.LAYOUTS), "-o", "f", "--threads", "1"
            ),
            command("inspect", "../in/m"),
        )
    )
    further = (
        (command("export", "m.gguf", "--to", "card", "-o", "m.md", *extra),)
        if "m.gguf" in first.args
        else ()
    )
    return Case(f"card: {what}", (first, *further))


_METHODS = ("torch", "transformers", "quantcli.layerwise.meta_model", "quantcli.run.apply_methods")
"""What a plan with a calibrated method imports."""
KINDS = (
    Kind("recipes", _warm, _make, _METHODS),
    Kind("options", _warm, _make_options, _METHODS),
    Kind("cards", _warm, _make_card),
)
