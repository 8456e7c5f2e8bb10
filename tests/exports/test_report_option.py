"""`--report FOLDER`: the page of what a command has just made or measured."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path

import pytest

from quantcli.cli.app import run as run_here
from quantcli.exports.report.sensitivity import by_block

pytest.importorskip("matplotlib")
TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"


def _rows(page: str, name: str) -> dict[str, list[str]]:
    """The cells of each tensor of a file, by its name, as a reader of the page sees them."""
    part = page[page.index(f"<summary>{name}: ") :].partition("</details>")[0]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in part.split("<tr>")]
    return {unescape(row[0]): row for row in rows if row}


def test_a_quantization_shows_each_tensors_error(mini: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    command = ["quantize", str(mini), "--type", "Q4_0,Q8_0", "-o", f"{out}/", "--report", str(out)]
    assert run_here([*command, "-q"]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    four, eight = (
        _rows(page, f"{mini.name}-{kind}.gguf")["blk.0.ffn_up.weight"] for kind in ("Q4_0", "Q8_0")
    )
    assert four[2] == "Q4_0"
    # Codes of 4 and of 8 bits are 16 times apart.
    apart = float(four[4].split()[0]) / float(eight[4].split()[0])
    assert apart == pytest.approx(16, rel=0.3)
    assert "Sensitivity" not in page
    assert (out / "README.md").read_text().count("| bookworm-mini-Q") == 2


def test_what_types_cost_is_in_the_page(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    command = [
        "quantize", str(mini), "--bits", "3", "--allocate", "--calibrate", str(TEXT), "--chunks",
        "4", "-o", str(tmp_path / "m.gguf"), "--report", str(tmp_path / "page"), "--json",
    ]  # fmt: skip
    assert run_here(command) == 0
    printed = capsys.readouterr()
    pages = json.loads(printed.out)["report"]
    assert pages == [str(tmp_path / "page" / name) for name in ("report.html", "README.md")]
    page = Path(pages[0]).read_text(encoding="utf-8")
    assert "Sensitivity by layer" in page
    rows = _rows(page, "m.gguf")
    assert rows["tensor"][5] == "estimated KLD"
    told = float(re.findall(r"for a KL divergence of about ([\d.e-]+);", printed.err)[0])
    costs = [float(row[5]) for name, row in rows.items() if name != "tensor" and row[5]]
    # The page rounds each to two digits.
    assert math.isclose(sum(costs), told, rel_tol=0.02)


def test_an_evaluation_shows_its_figures(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    q4 = tmp_path / "m-Q4_0.gguf"
    assert run_here(["quantize", str(mini), "--type", "Q4_0", "-q", "-o", str(q4)]) == 0
    capsys.readouterr()
    command = [
        "eval-ppl", str(q4), "--reference", str(mini), "--engine", "torch", "--data", str(TEXT),
        "--chunks", "2", "--ctx", "64", "--report", str(tmp_path / "page"), "--json",
    ]  # fmt: skip
    assert run_here(command) == 0
    (found,) = json.loads(capsys.readouterr().out)["results"]
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    table = page.partition("<tbody>")[2].partition("</tbody>")[0]
    assert f"<td>{found['perplexity']['value']:.4f}</td>" in table
    assert f"<td>{found['kld']['value']:.5f}</td>" in table
    assert "relative error" in page


def test_sums_by_block() -> None:
    costs = {
        "blk.0.a.weight": {"Q2_K": 3.0, "Q8_0": 0.5, "F16": 0.0},
        "blk.0.b.weight": {"Q2_K": 1.0, "Q8_0": 0.25, "IQ1_S": 9.0, "F16": 0.0},
        "blk.11.a.weight": {"Q2_K": 2.0, "Q8_0": 0.125, "F16": 0.0},
        "output.weight": {"Q2_K": 100.0, "Q8_0": 100.0},
    }
    assert [(each.kind, each.blocks) for each in by_block(costs)] == [
        ("Q2_K", ((0, 4.0), (11, 2.0))),
        ("Q8_0", ((0, 0.75), (11, 0.125))),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("quantize {mini} --bits 4 -o {there}/a.gguf --report {there}", "README.md"),
        ("quantize {mini} --to gptq -o {there}/new --report {there}/new", "a card of its own"),
        ("quantize {mini} --bits 4 -o {there}/a.gguf --report {there}/README.md", "is a file"),
        ("eval-ppl {mini} --data {text} --report {there}", "README.md"),
    ],
)
def test_said_before_the_work(
    line: str, said: str, mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("mine")
    words = line.format(mini=mini, there=tmp_path, text=TEXT).split()
    assert run_here(words) in (1, 2)
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"
