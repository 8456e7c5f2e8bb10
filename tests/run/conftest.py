"""A model that methods round in a second."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.frozen_inputs import write_input


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    write_input("small", folder)
    return folder / "small"
