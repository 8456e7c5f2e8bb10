"""Logits come in blocks of positions, and the figures are those of whole windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantcli.evals import scores
from quantcli.evals.artifacts import open_artifact
from quantcli.evals.bases.file import BaseFile
from quantcli.evals.run import EvaluationDone, EvaluationJob, evaluate
from quantcli.evals.summary import Summary
from quantcli.evals.windows import cut
from quantcli.layerwise.texts import read_texts

TEXT = Path(__file__).parents[1] / "data" / "pride-and-prejudice.txt"
ENGINES = ["llama.cpp", "torch"]


@pytest.fixture(autouse=True)
def _libraries() -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("torch")


def measure(paths: list[Path], engine: str, **options: object) -> list[Summary]:
    opened = [open_artifact(str(path), engine=engine) for path in paths]
    base = {"reference": opened[0]} if len(opened) > 1 else {}
    job = EvaluationJob(
        opened[-1:], read_texts([str(TEXT)]), chunks=2, threads=1, **base, **options
    )  # type: ignore[arg-type]
    found = [e.summary for e in evaluate(job) if isinstance(e, EvaluationDone)]
    for artifact in opened:
        artifact.model.store.close()
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_small_blocks_give_the_same_figures(
    gguf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    paths, base = [gguf("BF16"), gguf("Q2_K")], tmp_path / "base"
    (whole,) = measure(paths, engine, save=base)
    monkeypatch.setattr(scores, "HELD", 100 * 4096)
    (blocked,) = measure(paths, engine, save=tmp_path / "blocked")
    assert whole.against is not None
    assert blocked.against is not None
    assert blocked.positions == whole.positions == 510
    assert blocked.perplexity.value == pytest.approx(whole.perplexity.value, rel=1e-6)
    assert blocked.against.mean.value == pytest.approx(whole.against.mean.value, rel=1e-5)
    bands = whole.against.by_confidence
    assert sum(band.positions for band in bands) == 510
    for band, other in zip(bands, blocked.against.by_confidence, strict=True):
        assert other.positions == band.positions
        if band.mean is not None and other.mean is not None:
            assert other.mean.value == pytest.approx(band.mean.value, rel=1e-5)
    if engine == "llama.cpp":
        assert base.read_bytes() == (tmp_path / "blocked").read_bytes()
    (stored,) = measure(paths[1:], engine, base=BaseFile(base))
    assert stored.against is not None
    assert stored.against.mean.value == pytest.approx(whole.against.mean.value, rel=0.01)
    for band, other in zip(bands, stored.against.by_confidence, strict=True):
        # 16 bits may lift a position over the end of its band.
        assert other.positions == pytest.approx(band.positions, abs=1)


def test_a_long_window_goes_through_llama_cpp_in_pieces(
    gguf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against llama-cpp-python's own interface, which runs the window as it likes."""
    from llama_cpp import Llama

    monkeypatch.setattr(scores, "HELD", 300 * 4096)
    with (artifact := open_artifact(str(gguf("BF16")), engine="llama.cpp")).model:
        engine = artifact.load(1200, 1)
        (window,) = cut(engine.tokenize(TEXT.read_text()), 1200, begin=engine.begin, chunks=1)
        blocks = [block.copy() for block in engine.run([window])]
        engine.close()
    assert [len(block) for block in blocks] == [300, 299]
    other = Llama(str(gguf("BF16")), n_ctx=1200, n_threads=1, logits_all=True, verbose=False)
    other.eval(window.tokens.tolist())
    wanted = other.scores[window.first : window.last]
    other.close()
    found = np.concatenate(blocks)
    # The library repacks weights, and so rounds a little otherwise.
    assert np.abs(found - wanted).max() < 0.05 * wanted.std()
    assert np.sqrt(np.square(found - wanted).mean()) < 0.005 * wanted.std()
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.98


def test_a_block_that_is_not_finite_is_named_by_its_position() -> None:
    from quantcli.errors import WeightError
    from quantcli.evals.engines.base import check_finite

    logits = np.zeros((4, 8), np.float32)
    logits[2, 3] = np.nan
    with pytest.raises(WeightError, match="scored position 103 of window 1"):
        check_finite(logits, "m", 0, 100)


def test_blocks_cover_every_position() -> None:
    for positions, vocabulary in ((16_383, 262_144), (255, 4096), (5, 1 << 26)):
        found = scores.row_blocks(positions, vocabulary)
        assert [i for rows in found for i in range(positions)[rows]] == list(range(positions))
        assert all((rows.stop - rows.start) * vocabulary <= max(scores.HELD, vocabulary)
                   for rows in found)  # fmt: skip
