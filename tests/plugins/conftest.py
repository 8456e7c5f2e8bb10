"""The plug-ins that CONTRIBUTING.md shows, as an installed distribution."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest
from support.plugin import Quantcli, command, install

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
_BLOCK = re.compile(r"^```\w+ title=(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_GROUP = re.compile(r"^\[(.+)\]\n((?:.+\n)+)", re.MULTILINE)


@pytest.fixture(scope="session")
def shown() -> dict[str, str]:
    """The page's code by file name; parts of entry_points.txt one after the other."""
    files: defaultdict[str, str] = defaultdict(str)
    for name, code in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        files[name] += code
    return dict(files)


@pytest.fixture(scope="session")
def quantcli(shown: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Quantcli:
    """``quantcli(*arguments)``: the command where the page's plug-ins are installed."""
    files = {"toy/__init__.py": "", **shown}
    groups = dict(_GROUP.findall(files.pop("entry_points.txt")))
    return command(install(tmp_path_factory.mktemp("toy"), "toy", files, groups))
