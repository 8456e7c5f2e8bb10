"""The documentation builds as a site without a broken link, and loads nothing from other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", folder],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html")
             for path in (ROOT / "docs").rglob("*.md")}  # fmt: skip
    assert not [page for page in pages if not (site / page).is_file()]


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loads = re.compile(
        r"""<(?:script|img|iframe|link rel="stylesheet")[^>]*(?:src|href)="(http[^"]*)"""
    )
    for page in site.rglob("*.html"):
        assert not loads.findall(page.read_text()), page


def test_the_functions_are_documented(site: Path) -> None:
    page = (site / "api.html").read_text()
    for name in ("quantize", "calibrate", "evaluate", "export", "inspect"):
        assert f"quantcli.api.{name}.{name}" in page
