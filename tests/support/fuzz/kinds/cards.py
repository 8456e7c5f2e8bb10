"""Model cards, and results of evaluations for them."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from support.fuzz import micro
from support.fuzz.byte_edits import edit_bytes, spoil_file
from support.fuzz.case import Case, Kind, command
from support.fuzz.json_edits import edit_json
from support.fuzz.kinds.recipes import alias_bomb

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
            "---\n" + alias_bomb(chance).replace("type:", "license:") + "---\n"
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


def _warm(folder: Path) -> Any:
    return micro.model(folder)


KINDS = (Kind("cards", _warm, _make_card),)
