"""The page and the card of a set: what they hold, and that a browser shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from huggingface_hub import ModelCard
from support.browser import CHROMIUM, open_page

from quantcli.cli.app import run as run_here

pytest.importorskip("matplotlib")
TEXT = "novel.txt"
HOSTILE = "<script>alert(1)</script>"


def _result(path: Path, kld: float) -> dict[str, Any]:
    return {
        "artifact": str(path), "engine": "llama.cpp", "bytes": path.stat().st_size,
        "bits_per_weight": 5.0, "text": TEXT, "windows": 4, "positions": 1020,
        "perplexity": {"value": 50 + kld, "error": 1.0},
        "kld": {"value": kld, "error": 0.0001, "exact": True, "quantiles": {"0.99": 9 * kld}},
        "same_top": {"value": 0.9, "error": 0.01},
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("set")
    command = ["quantize", str(mini), "--type", "Q2_K,Q4_K_M,Q8_0", "-o", f"{made}/", "-q"]
    assert run_here([*command, "--override-kv", f"general.name=str:{HOSTILE}"]) == 0
    files = sorted(made.glob("*.gguf"), key=lambda path: path.stat().st_size)
    evaluation = {
        "schema": "quantcli.eval-ppl/1", "context": 512, "stride": None, "gates": [], "base": None,
        "reference": "folder/original.gguf", "reference_engine": "llama.cpp",
        "results": [_result(f, kld) for f, kld in zip(files, (0.12, 0.009, 0.0002), strict=True)],
        "speeds": [{
            "artifact": str(files[0]), "memory_bytes": 5_000_000,
            "prompt_tokens_per_second": 1234.0, "generation_tokens_per_second": 321.0,
        }],
    }  # fmt: skip
    (made / "quality.json").write_text(json.dumps(evaluation))
    report = ["export", *map(str, files), "--to", "report", "-o", str(made)]
    assert run_here([*report, "--eval", str(made / "quality.json"), "--against", str(mini)]) == 0
    return made


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_stands_alone(page: str) -> None:
    assert len(page) < 2_000_000
    assert not re.findall(r"""(?:src|href)=["'](?!#)[^"']+|url\((?!#)|@import|<script""", page)


def test_names_from_a_model_are_text(page: str) -> None:
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page


def test_every_tensor_has_its_type_and_its_error(folder: Path, mini: Path, page: str) -> None:
    """Errors are those that the reference's own decoder gives."""
    from gguf.quants import dequantize
    from safetensors.torch import load_file

    source = load_file(mini / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    weights = source.float().numpy()
    for path in folder.glob("*.gguf"):
        part = page[page.index(f"<summary>{path.name}: ") :].partition("</details>")[0]
        tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        assert part.count("<tr><td>") == len(tensors)
        found = tensors["blk.1.ffn_up.weight"]
        (row,) = re.findall(r"<tr><td>blk\.1\.ffn_up\.weight</td>.*?</tr>", part)
        assert f"<td>{found.tensor_type.name}</td>" in row
        apart = dequantize(found.data, found.tensor_type) - weights
        relative = float(np.sqrt((apart**2).sum() / (weights**2).sum()))
        (shown,) = re.findall(r"([\d.]+) %</td>", row)
        assert float(shown) == pytest.approx(100 * relative, rel=0.01)


def test_the_measured_figures_are_in_the_table(page: str) -> None:
    table = page.partition("<tbody>")[2].partition("</tbody>")[0]
    assert table.count("<tr>") == 3
    for text in ("0.12000", "0.00900", "0.00020", "90.0 %", "1,234", "321.0"):
        assert f"<td>{text}</td>" in table
    assert page.count("<svg") == 3


def test_the_card_is_one_that_the_hub_reads(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "gguf"
    results = card.data.eval_results
    assert results is not None
    klds = [found.metric_value for found in results if found.metric_type == "kld"]
    assert sorted(klds) == [0.0002, 0.009, 0.12]
    # The smallest file that is close to the original.
    assert "llama-cli -m " in card.text
    assert "Q4_K_M.gguf\n```" in card.text.partition("llama-cli -m ")[2]


def test_nothing_is_replaced_unasked(folder: Path) -> None:
    (file, *_) = folder.glob("*Q8_0.gguf")
    before = (folder / "README.md").read_bytes()
    assert run_here(["export", str(file), "--to", "report", "-o", str(folder)]) == 1
    assert (folder / "README.md").read_bytes() == before


def test_a_single_file_without_figures(folder: Path, tmp_path: Path) -> None:
    (file, *_) = folder.glob("*Q8_0.gguf")
    assert run_here(["export", str(file), "--to", "report", "-o", str(tmp_path / "new")]) == 0
    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert "relative error" not in text
    assert "<svg" not in text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(folder: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """No message on the console, nothing beside the page's width, and colours that follow."""
    probe = (
        "<script>document.querySelectorAll('details').forEach(d => d.open = true);"
        "const e = document.documentElement, s = getComputedStyle(document.body);"
        "e.dataset.wide = e.scrollWidth > e.clientWidth; e.dataset.paper = s.backgroundColor;"
        "e.dataset.ink = getComputedStyle(document.querySelector('svg')).color;</script>"
    )
    copy = tmp_path / "report.html"
    text = (folder / "report.html").read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    found, said = open_page(copy, tmp_path, width=width, dark=dark)
    assert "CONSOLE" not in said
    root = found.partition(">")[2].partition(">")[0]
    assert 'data-wide="false"' in root
    paper = "rgb(20, 24, 28)" if dark else "rgb(255, 255, 255)"
    ink = "rgb(227, 231, 235)" if dark else "rgb(29, 35, 41)"
    assert f'data-paper="{paper}"' in root
    assert f'data-ink="{ink}"' in root
