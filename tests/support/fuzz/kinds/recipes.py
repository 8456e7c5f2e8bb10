"""Recipes in TOML and YAML."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from support.fuzz import micro
from support.fuzz.byte_edits import edit_bytes, spoil_file
from support.fuzz.case import Case, Kind, command
from support.fuzz.json_edits import dump, edit_json
from support.fuzz.values import odd

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


def alias_bomb(chance: Random) -> str:
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
        raw = chance.choice((alias_bomb, _merged))(chance).encode()
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


METHODS = ("torch", "transformers", "quantcli.layerwise.meta_model", "quantcli.run.apply_methods")
"""What a plan with a calibrated method imports."""
KINDS = (Kind("recipes", _warm, _make, METHODS),)
