"""Edits of JSON: of the tree, of how it is written, and of the bytes."""

from __future__ import annotations

import json
from copy import deepcopy
from random import Random
from typing import Any

from support.fuzz.byte_edits import edit_bytes
from support.fuzz.values import Raw, odd, odd_like, odd_text

Place = tuple[Any, Any]


def dump(value: Any) -> str:
    """JSON with `Raw` parts as they are, and `Pairs` as objects."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{dump(key)}:{dump(item)}" for key, item in value.items) + "}"
    if isinstance(value, dict):
        if not any(isinstance(item, dict | list | tuple | Raw | Pairs) for item in value.values()):
            return json.dumps(value)
        return (
            "{"
            + ",".join(f"{json.dumps(str(key))}:{dump(item)}" for key, item in value.items())
            + "}"
        )
    if isinstance(value, list | tuple):
        if not any(isinstance(item, dict | list | tuple | Raw | Pairs) for item in value):
            return json.dumps(value)
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


class Pairs:
    """An object whose keys may come twice."""

    def __init__(self, items: list[tuple[Any, Any]]) -> None:
        self.items = items


def place(chance: Random, tree: Any, stop: float = 0.25) -> list[Place]:
    """The way to some part of ``tree``: (container, key) from the root on; upper parts oftener."""
    way: list[Place] = []
    while isinstance(tree, dict | list) and tree:
        key = chance.choice(list(tree)) if isinstance(tree, dict) else chance.randrange(len(tree))
        way.append((tree, key))
        tree = tree[key]
        if chance.random() < stop:
            break
    return way


def edit_tree(chance: Random, tree: Any) -> str:
    """Change one thing of ``tree`` in its place; what was done."""
    way = place(chance, tree)
    if not way:
        return "nothing"
    box, key = way[-1]
    name = ".".join(str(step)[:30] for _, step in way)
    what = chance.choices(
        ("odd", "like", "drop", "rename", "swap", "wrap", "add", "twice", "copy", "other"),
        (6, 8, 3, 1, 2, 1, 2, 1, 2, 2),
    )[0]
    if what == "odd":
        box[key] = odd(chance)
    elif what == "like":
        box[key] = odd_like(chance, box[key])
    elif what == "drop":
        del box[key]
    elif what == "rename" and isinstance(box, dict):
        box[odd_text(chance) if chance.random() < 0.5 else f"{key}_"] = box.pop(key)
    elif what == "swap":
        others = list(box) if isinstance(box, dict) else range(len(box))
        other = chance.choice(list(others))
        box[key], box[other] = box[other], box[key]
    elif what == "wrap":
        box[key] = chance.choice(([box[key]], {"value": box[key]}, {str(key): box[key]}))
    elif what == "add":
        if isinstance(box, dict):
            box[odd_text(chance)] = odd(chance)
        else:
            box.insert(chance.randrange(len(box) + 1), odd(chance))
    elif what == "twice" and isinstance(box, dict) and len(way) > 1:
        outer, at = way[-2]
        outer[at] = Pairs([*box.items(), (key, odd_like(chance, box[key]))])
    elif what == "copy" and len(way) > 1:
        # A part within itself, as far as a file can say that.
        box[key] = deepcopy(way[-2][0])
    else:
        further = place(chance, tree, 0.4)
        box[key] = deepcopy(further[-1][0][further[-1][1]])
    text = repr(box[key])[:60] if what in ("odd", "like", "wrap") else ""
    return f"{what} {name} {text}".rstrip()


def edit_json(chance: Random, tree: Any) -> tuple[bytes, str]:
    """``tree`` (kept as it is) with one to three edits, as a file's bytes; what was done."""
    tree = deepcopy(tree)
    if chance.random() < 0.03:
        value = odd(chance)
        return _encode(dump(value)), f"root {str(value)[:40]!r}"
    done = []
    for _ in range(chance.choices((1, 2, 3), (7, 2, 1))[0]):
        if isinstance(tree, dict | list):
            try:
                done.append(edit_tree(chance, tree))
            except (TypeError, KeyError, AttributeError, IndexError, RecursionError):
                # An earlier edit took away what this one wanted.
                done.append("nothing")
    raw = _encode(dump(tree))
    if chance.random() < 0.08:
        raw, what = edit_text(chance, raw)
        done.append(what)
    return raw, "; ".join(done)


def edit_text(chance: Random, raw: bytes) -> tuple[bytes, str]:
    """Edits of how a text is written."""
    what = chance.choice(("cut", "mark", "tail", "utf16", "latin", "comment", "quotes", "bytes"))
    if what == "cut":
        return raw[: chance.randrange(len(raw) + 1)], what
    if what == "mark":
        return b"\xef\xbb\xbf" + raw, what
    if what == "tail":
        return raw + chance.choice((b"}", b"\0", b" x", raw, b"\n\n//", b"\xff\xfe")), what
    if what == "utf16":
        return raw.decode("utf-8", "replace").encode("utf-16"), what
    if what == "latin":
        at = chance.randrange(len(raw) + 1)
        return raw[:at] + b"\xe9\xff" + raw[at:], what
    if what == "comment":
        return b"/* x */" + raw, what
    if what == "quotes":
        return raw.replace(b'"', b"'"), what
    return edit_bytes(chance, raw), what


def _encode(text: str) -> bytes:
    # Half a pair that was not escaped is what a program in another language writes.
    return text.encode("utf-8", "surrogatepass")
