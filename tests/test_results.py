"""docs/results.md is what its record says, and the record names a commit."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_is_that_of_the_record() -> None:
    record = json.loads((ROOT / "docs" / "results.json").read_text(encoding="utf-8"))
    page = runpy.run_path(str(ROOT / "scripts" / "make-results"))["render"](record)
    found = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert found == page, "run scripts/make-results --page"
    assert re.fullmatch(r"[0-9a-f]{40}", record["commit"])
    assert record["commit"][:10] in page
    for row in record["rows"]:
        assert f"{row['kld']['value']:.5f} ± {row['kld']['error']:.5f}" in page
