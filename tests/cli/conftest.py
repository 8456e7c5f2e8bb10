from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def mini() -> Path:
    """A small real checkpoint."""
    return Path(__file__).parents[1] / "data" / "bookworm-mini"
