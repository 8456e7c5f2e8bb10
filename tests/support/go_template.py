"""The part of Go's text/template that our chat templates use, written from its documentation.

https://pkg.go.dev/text/template: actions in ``{{ }}``, a dash that trims white space, variables,
``range`` over a list with the dot set to each item, ``if``, ``else if``, ``else``, ``end``, ``eq``.
"""

from __future__ import annotations

import re
from typing import Any

_ACTION = re.compile(r"\{\{(- )?\s*(.*?)\s*( -)?\}\}", re.DOTALL)


def render(template: str, data: dict[str, Any]) -> str:
    tokens: list[tuple[str, str]] = []
    place = 0
    trim = False
    for match in _ACTION.finditer(template):
        text = template[place : match.start()]
        if trim:
            text = text.lstrip()
        if match[1]:
            text = text.rstrip()
        tokens += [("text", text), ("action", match[2])]
        trim = bool(match[3])
        place = match.end()
    rest = template[place:]
    tokens.append(("text", rest.lstrip() if trim else rest))
    out: list[str] = []
    end = _run(tokens, 0, data, {}, out)
    assert end == len(tokens), "an end without a beginning"
    return "".join(out)


def _run(
    tokens: list[tuple[str, str]],
    place: int,
    dot: Any,
    variables: dict[str, Any],
    out: list[str] | None,
) -> int:
    """Run from ``place`` to the matching else or end, whose place is returned; None skips."""
    while place < len(tokens):
        kind, text = tokens[place]
        if kind == "text":
            if out is not None:
                out.append(text)
            place += 1
        elif text == "end" or text == "else" or text.startswith("else if "):
            return place
        elif text.startswith("range "):
            items = [] if out is None else _value(text[6:], dot, variables)
            stop = _run(tokens, place + 1, dot, variables, None)
            for item in items:
                _run(tokens, place + 1, item, variables, out)
            assert tokens[stop][1] == "end"
            place = stop + 1
        elif text.startswith("if "):
            place = _branch(tokens, place, text[3:], dot, variables, out)
        elif match := re.fullmatch(r"(\$\w+) (:?=) (.+)", text):
            if out is not None:
                assert match[2] == ":=" or match[1] in variables, "assigned before it is declared"
                variables[match[1]] = _value(match[3], dot, variables)
            place += 1
        else:
            if out is not None:
                out.append(str(_value(text, dot, variables)))
            place += 1
    return place


def _branch(tokens, place, condition, dot, variables, out):  # type: ignore[no-untyped-def]
    taken = False
    while True:
        holds = condition is None or (out is not None and bool(_value(condition, dot, variables)))
        mine = out if holds and not taken else None
        taken = taken or mine is not None
        place = _run(tokens, place + 1, dot, variables, mine)
        action = tokens[place][1]
        if action == "end":
            return place + 1
        condition = None if action == "else" else action[8:]


def _value(text: str, dot: Any, variables: dict[str, Any]) -> Any:
    words = re.findall(r'"[^"]*"|\S+', text)
    if words[0] == "eq":
        return _value(words[1], dot, variables) == _value(words[2], dot, variables)
    (word,) = words
    if word.startswith('"'):
        return word[1:-1]
    if word.startswith("$"):
        return variables[word]
    assert word.startswith("."), word
    return dot[word[1:]]
