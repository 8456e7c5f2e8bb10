"""The commands of the documentation's pages, and what the pages show below them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
_NUMBER = re.compile(r"(?<![\w.-])[-+]?\d[\d,]*(?:\.\d+)?(?![\w.]*[A-Za-z_])")
_VARIES = re.compile(r"\b(time|free disk|peak memory)\b|t/s")
"""Lines whose numbers are another machine's."""
_NEAR = 0.1
"""By how much of itself a number may differ: llama.cpp's kernels add in their own order."""


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language ("" has none), without the indent of the list they are in."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in found]


def steps(block: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block, and the lines that are shown below it."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.replace("\\\n", " ").splitlines()
        yield lines[0], [line for line in lines[1:] if line not in ("...", "")]


def check_shown(shown: Sequence[str], printed: str) -> None:
    """AssertionError for a line that is shown and not printed, in this order.

    Spaces do not count, and numbers may differ by a tenth, or at will where they are a
    machine's: times, speeds, memory, free disk.
    """
    rest = iter(printed.splitlines())
    for line in shown:
        before = []
        for other in rest:
            before.append(other)
            if _alike(line, other):
                break
        else:
            raise AssertionError(f"{line!r} is shown, and not printed in:\n{printed}")


def _alike(shown: str, printed: str) -> bool:
    texts = [" ".join(_NUMBER.sub("0", line).split()) for line in (shown, printed)]
    if texts[0] != texts[1]:
        return False
    if _VARIES.search(shown):
        return True
    # The seconds that something took.
    pairs = [_NUMBER.findall(re.sub(r"in [\d.]+ s\b", "", line)) for line in (shown, printed)]
    return all(
        abs(a - b) <= _NEAR * max(abs(a), abs(b))
        for a, b in zip(*[[float(n.replace(",", "")) for n in each] for each in pairs], strict=True)
    )
