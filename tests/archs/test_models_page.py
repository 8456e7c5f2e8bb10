"""docs/models.md names every architecture and class, with what was measured of it."""

from __future__ import annotations

import re
from pathlib import Path

import quantcli
from quantcli.archs import ARCHITECTURES

PAGE = Path(quantcli.__file__).parent.parent / "docs" / "models.md"


def test_the_page_of_models_is_complete() -> None:
    """After an addition run scripts/make-models-page."""
    rows = {}
    for line in PAGE.read_text().splitlines():
        if match := re.match(r"\| `([^`]+)` \| (.*) \|$", line):
            rows[match[1]] = match[2].split(" | ")
    families = {name: ARCHITECTURES.get(name).name for name in ARCHITECTURES}
    assert set(rows) == set(families.values())
    for name, arch in families.items():
        assert name.removesuffix("ForCausalLM") in rows[arch][1].split(", ")
    assert all(cells[0] for cells in rows.values())
