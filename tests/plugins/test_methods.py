"""Transforms and rounders from other distributions: run, and refused by name where broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGUFReader
from support.plugin import Quantcli, command, install

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")

CODE = """
class Lacking:
    name, options = "lacking", ()
class Wishing:
    name, options, needs = "wishing", (), ("moon",)
    fits = round = check = find = None
class Floats:
    name, options, needs = "floats", (), ("importance",)
    def fits(self, codec):
        return True
    def round(self, codec, rows, statistics, options, pool):
        return rows
class Endless:
    name, options, needs = "endless", (), ()
    def check(self, model, earlier):
        pass
    def find(self, model, grids, statistics, options):
        yield from ()
LACKING, WISHING, FLOATS, ENDLESS = Lacking(), Wishing(), Floats(), Endless()
"""
GROUPS = {
    "quantcli.transforms": "endless = odd:ENDLESS\nwish = odd:WISHING\n",
    "quantcli.rounders": "lacking = odd:LACKING\nfloats = odd:FLOATS\n",
    "quantcli.trainers": "drill = odd:LACKING\n",
}
BROKEN = {
    "lacking": "rounder 'lacking' of odd 1.0 is no rounder: it has no attribute 'needs'",
    "wish": "transform 'wish' of odd 1.0 is no transform: there is no statistic 'moon'",
    "drill": "trainer 'drill' of odd 1.0 is no trainer: it has no attribute 'train'",
    "floats": "the rounder 'floats' returned float32 (",
    "endless": "the transform 'endless' ended without a result",
}


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Quantcli:
    """The command where broken methods are installed."""
    return command(install(tmp_path_factory.mktemp("odd"), "odd", {"odd.py": CODE}, GROUPS))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    book = Path(__file__).parents[1] / "data" / "pride-and-prejudice.txt"
    short = tmp_path_factory.mktemp("text") / "text.txt"
    short.write_text(book.read_text(encoding="utf-8")[:12000], encoding="utf-8")
    return short


def test_a_transform_and_a_rounder_run(
    quantcli: Quantcli, mini: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    arguments = ["--bits", "4", "--method", "even,shrink", "--calibrate", text, "--json", "-o", out]
    result = json.loads(quantcli("quantize", mini, *arguments).stdout)
    rounded = [tensor for tensor in result["tensors"] if tensor["method"] == "shrink"]
    assert rounded
    assert all(tensor["loss_after"] <= tensor["loss_before"] for tensor in rounded)
    assert any(tensor["loss_after"] < tensor["loss_before"] for tensor in rounded)
    done = GGUFReader(out).fields["quantcli.transforms"].contents()
    assert [entry["method"] for entry in json.loads(done)] == ["even"]


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_the_protocol_is_named(
    odd: Quantcli, mini: Path, text: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "x.gguf"
    arguments = ["--bits", "4", "--method", name, "--calibrate", text, "-o", out]
    done = odd("quantize", mini, *arguments, code=2)
    assert BROKEN[name] in " ".join(done.stderr.split())
    assert not out.exists()
