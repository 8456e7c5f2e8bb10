"""Commands give the bytes that they gave before: the digests in tests/golden/frozen.json.

Those of commands that run a model depend on the machine; ``scripts/check-frozen`` compares them.
"""

from __future__ import annotations

import json

import pytest
from support.frozen import GOLDEN, Workspace, difference
from support.frozen_commands import select

pytest.importorskip("transformers", reason="transformers writes the tiny models")

EXPECTED = json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("frozen"))


@pytest.mark.parametrize("name", select(kind="portable"))
def test_the_bytes_are_those_frozen(name: str, workspace: Workspace) -> None:
    assert difference(workspace.run(name), EXPECTED[name]) is None


def test_every_frozen_command_is_still_there() -> None:
    assert EXPECTED.keys() == set(select(kind="portable"))
