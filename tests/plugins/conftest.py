"""The plug-ins that CONTRIBUTING.md shows, as an installed distribution."""

from __future__ import annotations

import re

import pytest
from support.contributing import shown_files
from support.plugin import Quantcli, command, install

_GROUP = re.compile(r"^\[(.+)\]\n((?:.+\n)+)", re.MULTILINE)


@pytest.fixture(scope="session")
def shown() -> dict[str, str]:
    """The page's code by file name; parts of entry_points.txt one after the other."""
    return shown_files()


@pytest.fixture(scope="session")
def quantcli(shown: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Quantcli:
    """``quantcli(*arguments)``: the command where the page's plug-ins are installed."""
    files = {"toy/__init__.py": "", **shown}
    groups = dict(_GROUP.findall(files.pop("entry_points.txt")))
    return command(install(tmp_path_factory.mktemp("toy"), "toy", files, groups))
