from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"


@pytest.fixture
def variant(tmp_path: Path) -> Callable[..., Path]:
    """``variant(key=value, ...)``: the small checkpoint with other settings; None removes one."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "variant"
        folder.mkdir()
        for path in MINI.iterdir():
            (folder / path.name).symlink_to(path)
        config = json.loads((MINI / "config.json").read_text()) | changes
        (folder / "config.json").unlink()
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
        return folder

    return make
