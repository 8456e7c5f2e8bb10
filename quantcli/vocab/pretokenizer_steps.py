"""A pre-tokenizer of ``tokenizer.json`` as a list of steps that can be compared with the table.

tokenizers nests sequences and has several components that do the same: ``ByteLevel`` with its own
regex is GPT-2's split and the byte mapping, ``Digits`` and ``Punctuation`` are splits. Reduced to
splits and one ``bytes`` step, two pre-tokenizers that split alike are equal, and the list reads
like llama.cpp's own (a regex applied inside the pieces of the one before).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantcli.vocab import regexes

BYTES = "bytes"
"""The step that maps each byte to a printable character, as GPT-2 does."""


def split(regex: str, behavior: str = "isolated") -> str:
    """The step that makes each match of ``regex`` a piece of its own."""
    return f"split {behavior} {regex}"


def read_steps(node: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The steps of a ``pre_tokenizer`` object; one that is not known becomes its type's name."""
    if not node:
        return ()
    kind = str(node.get("type"))
    if kind == "Sequence":
        return tuple(step for part in node.get("pretokenizers", ()) for step in read_steps(part))
    if kind == "Split":
        return (_read_split(node),)
    if kind == "ByteLevel":
        first = (split(regexes.GPT2),) if node.get("use_regex", True) else ()
        return (*first, f"{BYTES} after a space" if node.get("add_prefix_space", True) else BYTES)
    if kind == "Digits":
        return (split(regexes.DIGIT if node.get("individual_digits") else regexes.DIGITS),)
    if kind == "Punctuation" and node.get("behavior") == "Contiguous":
        return (split(regexes.PUNCTUATION_RUNS),)
    flags = " ".join(f"{key}={value}" for key, value in sorted(node.items()) if key != "type")
    return (f"{kind} {flags}".strip(),)


def _read_split(node: Mapping[str, Any]) -> str:
    pattern = node.get("pattern")
    pattern = pattern if isinstance(pattern, Mapping) else {}
    behavior = str(node.get("behavior")).lower()
    inverted = bool(node.get("invert"))
    if "Regex" not in pattern:
        return f"split {behavior}{' inverted' * inverted} string {pattern.get('String')!r}"
    regex = regexes.canonical(str(pattern["Regex"]))
    # Where a regex covers all text, removing what it leaves out removes nothing.
    if inverted and behavior in ("removed", "isolated") and regex in regexes.COVERING:
        return split(regex)
    return split(regex, behavior + " inverted" * inverted)
