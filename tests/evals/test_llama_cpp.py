"""The llama.cpp engine gives the figures that llama.cpp's own perplexity program printed.

tests/golden/perplexity.json holds them, with the program's version and arguments, for the model
in this repository and the first six windows of the text beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcli.evals.artifacts import open_artifact
from quantcli.evals.bases.file import BaseFile
from quantcli.evals.run import EvaluationDone, EvaluationJob, evaluate
from quantcli.evals.summary import Divergence, Summary
from quantcli.layerwise.texts import read_texts

pytest.importorskip("llama_cpp")

HERE = Path(__file__).parent
TEXT = HERE.parent / "data" / "pride-and-prejudice.txt"
GOLDEN = json.loads((HERE.parent / "golden" / "perplexity.json").read_text())
TYPES = tuple(GOLDEN["against_base"])
WINDOWS = 6


def _measure(**options: Any) -> list[EvaluationDone]:
    return [
        e for e in evaluate(EvaluationJob(threads=1, **options)) if isinstance(e, EvaluationDone)
    ]


@pytest.fixture(scope="module")
def base(
    gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Summary, Path]:
    """The BF16 model's own figures, and its predictions in llama.cpp's format."""
    path = tmp_path_factory.mktemp("base") / "base.kld"
    with (artifact := open_artifact(str(gguf("BF16")))).model:
        (found,) = _measure(
            artifacts=[artifact], texts=read_texts([str(TEXT)]), chunks=WINDOWS, save=path
        )
    return found.summary, path


@pytest.fixture(scope="module")
def quantized(
    gguf: Callable[[str], Path], base: tuple[Summary, Path]
) -> dict[str, tuple[Summary, Divergence]]:
    artifacts = [open_artifact(str(gguf(kind))) for kind in TYPES]
    found = _measure(artifacts=artifacts, base=BaseFile(base[1]))
    for artifact in artifacts:
        artifact.model.store.close()
    pairs = {}
    for kind, result in zip(TYPES, found, strict=True):
        assert result.summary.against is not None
        pairs[kind] = (result.summary, result.summary.against)
    return pairs


def test_the_perplexity_is_llama_perplexitys(base: tuple[Summary, Path]) -> None:
    value, error = GOLDEN["base"]["perplexity"]
    assert base[0].perplexity.value == pytest.approx(value, rel=5e-5)
    assert base[0].perplexity.error == pytest.approx(error, rel=5e-5)
    assert base[0].positions == WINDOWS * 255


FIGURES: dict[str, Callable[[Summary, Divergence], Any]] = {
    "Mean PPL(Q)": lambda s, a: s.perplexity,
    "Mean PPL(base)": lambda s, a: a.base_perplexity,
    "Mean ln(PPL(Q)/PPL(base))": lambda s, a: a.log_ratio,
    "Mean PPL(Q)/PPL(base)": lambda s, a: a.ratio,
    "Mean PPL(Q)-PPL(base)": lambda s, a: a.difference,
    "Mean KLD": lambda s, a: a.mean,
    "Mean Δp": lambda s, a: a.p_mean,
    "RMS Δp": lambda s, a: a.p_rms,
    "Same top p": lambda s, a: a.same_top,
}
_QUANTILES = {
    "Maximum": 1.0, "99.9%": 0.999, "99.0%": 0.99, "95.0%": 0.95, "90.0%": 0.9, "Median": 0.5,
    "10.0%": 0.1, "5.0%": 0.05, "1.0%": 0.01, "0.1%": 0.001, "Minimum": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", FIGURES)
def test_means_and_errors(
    name: str, kind: str, quantized: dict[str, tuple[Summary, Divergence]]
) -> None:
    found = FIGURES[name](*quantized[kind])
    percent = 100 if "Δp" in name or "top" in name else 1
    value, error = GOLDEN["against_base"][kind][name]
    # Four significant digits, or the last digit that the program prints.
    last = 1.5e-3 if percent == 100 else 1.5e-6
    assert percent * found.value == pytest.approx(value, rel=1e-4, abs=last)
    assert percent * found.error == pytest.approx(error, rel=1e-4, abs=last)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("what", ["KLD", "Δp"])
def test_quantiles(what: str, kind: str, quantized: dict[str, tuple[Summary, Divergence]]) -> None:
    against = quantized[kind][1]
    for name, fraction in _QUANTILES.items():
        (wanted,) = GOLDEN["against_base"][kind][f"{name} {what}"]
        if what == "KLD":
            assert against.quantiles[fraction] == pytest.approx(wanted, rel=1e-4, abs=1.5e-6), name
        else:
            found = 100 * against.p_quantiles[fraction]
            assert found == pytest.approx(wanted, rel=1e-4, abs=1.5e-3), name


@pytest.mark.parametrize("kind", TYPES)
def test_correlation(kind: str, quantized: dict[str, tuple[Summary, Divergence]]) -> None:
    (wanted,) = GOLDEN["against_base"][kind]["Cor(ln(PPL(Q)), ln(PPL(base)))"]
    assert 100 * quantized[kind][1].correlation == pytest.approx(wanted, abs=0.006)


def test_a_base_that_runs_beside_gives_the_same(
    gguf: Callable[[str], Path], quantized: dict[str, tuple[Summary, Divergence]]
) -> None:
    artifact, reference = (open_artifact(str(gguf(kind))) for kind in ("Q4_K_M", "BF16"))
    with artifact.model, reference.model:
        (found,) = _measure(
            artifacts=[artifact], reference=reference, texts=read_texts([str(TEXT)]), chunks=WINDOWS
        )
    stored = quantized["Q4_K_M"][1]
    assert found.summary.perplexity == quantized["Q4_K_M"][0].perplexity
    assert found.summary.against is not None
    # 16 bits of a base's log-probabilities cost this much.
    assert found.summary.against.mean.value == pytest.approx(stored.mean.value, rel=1e-3)
    assert found.summary.against.same_top.value == stored.same_top.value
