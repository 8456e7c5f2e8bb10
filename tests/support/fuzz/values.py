"""Values that a careless reader falls over."""

from __future__ import annotations

from copy import deepcopy
from random import Random
from typing import Any


class Raw(str):
    """Text that stands in a JSON file as it is."""

    __slots__ = ()


NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 31, 64, 127, 255, 256, 65536, 1.5, -0.5, 0.1, 1e-45, -0.0, 2**31 - 1, 2**31,
    -(2**31), 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 1e39, 1e308, -1e308,
    Raw("1e999"), Raw("-1e999"), Raw("NaN"), Raw("Infinity"), Raw("1" + "0" * 400),
    Raw("-" + "9" * 5000), Raw("1e-999"), Raw("1E400"), Raw("0." + "1" * 3000), Raw("01"),
)  # fmt: skip
TEXTS: tuple[Any, ...] = (
    "", " ", "64", "-1", "nan", "None", "true", "é\n", "a\tb\r\n", "\x00", "\x1b[31mred\x1b[0m",
    "\x9b31m", "\u202eevil", "\ud800", "a\udc80b", "\ufeff", "\u2028", "\U000e0001", "🤗" * 20,
    "a" * 3000, "ab" * 60_000, "../../../etc/passwd", "/etc/passwd", "/dev/zero", "-x", "--force",
    "%s%n", "{0.__class__}", "{{ 7*7 }}", "$(id)", "'; --", '"', "\\", "<script>", "re:((a+)+)+$",
    "re:(", "re:" + "(" * 400, "*", "[", "a.b.c", ".", "..", "model.layers.0.self_attn.q_proj",
    "İ", "ß", "ﬀ", "\u0130", "e\u0301" * 50, "float32", "bfloat16", "auto", "int4", "x\n\nFROM y",
)  # fmt: skip
SHAPES: tuple[Any, ...] = (
    None, True, False, [], {}, [None], [[]], [{}], {"": None}, {"a": {"a": {}}}, [0, 1, 2],
    ["a", 1, None], [1.5], [-1], {"type": "Sequence"}, {"0": 0}, [[0, 0]], [["a", "b", "c"]],
)  # fmt: skip


def deep(chance: Random) -> Raw:
    """Brackets within brackets."""
    depth = chance.choice((30, 200, 1200, 30_000))
    opening, closing = chance.choice((("[", "]"), ('{"a":', "}"), ('[{"type":', "}]")))
    return Raw(opening * depth + "1" + closing * depth)


def odd(chance: Random) -> Any:
    """Any of them."""
    group = chance.choices((NUMBERS, TEXTS, SHAPES, None), (5, 5, 4, 1))[0]
    # A copy: further edits change it, and another trial must find it as it was.
    return deep(chance) if group is None else deepcopy(chance.choice(group))


def odd_text(chance: Random) -> str:
    """A text among them."""
    return str(chance.choice(TEXTS))


def odd_like(chance: Random, value: Any) -> Any:
    """An odd value, most likely of the type of ``value``, which the first check lets by."""
    if chance.random() < 0.3:
        return odd(chance)
    if isinstance(value, bool):
        return chance.choice((not value, None, 0, "true"))
    if isinstance(value, int):
        near = (value + 1, value - 1, value * 2, value // 2, -value, value * 10**6, value**5)
        return chance.choice((*near, *NUMBERS))
    if isinstance(value, float):
        return chance.choice((-value, value * 1e30, value * 1e-30, 1 / (value or 1), *NUMBERS))
    if isinstance(value, str):
        return chance.choice(
            (
                value * 2,
                value.upper(),
                value[:-1],
                value + "\n",
                value + "é",
                value[::-1],
                f" {value}",
                *TEXTS,
            )
        )
    if isinstance(value, list):
        return chance.choice(
            (
                value * 2,
                value[::-1],
                value[:1],
                value[1:],
                [value],
                [*value, None],
                value * 200,
                dict(enumerate(map(str, value))),
            )
        )
    if isinstance(value, dict):
        return chance.choice(
            (list(value), list(value.items()), {}, [value], {"": value}, dict.fromkeys(value))
        )
    return odd(chance)
