"""A model-folder layout from another distribution; more in tests/layouts/test_new_layout.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.plugin import Quantcli, command, install

pytestmark = pytest.mark.slow

BROKEN = "toy = toys:TOY\n"


def test_it_is_written_and_read_back(quantcli: Quantcli, mini: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    quantcli("quantize", mini, "--to", "toy", "-o", folder)
    found = json.loads(quantcli("inspect", folder, "--json").stdout)
    assert "toy int4, groups of 64" in {tensor["dtype"] for tensor in found["tensors"]}
    quantcli("export", folder, "--to", "gguf", "-o", tmp_path / "out.gguf")
    assert "toy" in quantcli("quantize", "--help").stdout


@pytest.mark.parametrize("call", [["quantize", "--to", "toy"], ["export", "--to", "toy"]])
def test_one_that_is_broken_is_named(call: list[str], mini: Path, tmp_path: Path) -> None:
    site = install(tmp_path, "toys", {"toys.py": "TOY = 4\n"}, {"quantcli.layouts": BROKEN})
    done = command(site)(*call[:1], mini, *call[1:], code=2)
    assert "the output format 'toy' of toys 1.0 is no output format" in done.stderr
    assert "it is of type int, not a quantcli.layouts.base.Layout" in done.stderr
