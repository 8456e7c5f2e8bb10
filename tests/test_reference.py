"""docs/reference.md says what the program takes."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_reference_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "make-reference"))["reference"]()
    found = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert found == page, "run scripts/make-reference"
