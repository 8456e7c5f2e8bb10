"""The code that CONTRIBUTING.md shows."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

_PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
_BLOCK = re.compile(r"^```\w+ title=(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shown_files() -> dict[str, str]:
    """The page's code by file name; parts of entry_points.txt one after the other."""
    files: defaultdict[str, str] = defaultdict(str)
    for name, code in _BLOCK.findall(_PAGE.read_text(encoding="utf-8")):
        files[name] += code
    return dict(files)
