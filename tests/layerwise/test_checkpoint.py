"""A run that was broken off goes on to the same bytes; calibrations add up exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.calibrations import TEXT, run

pytest.importorskip("torch")
pytest.importorskip("transformers")

EVERYTHING = ["abs_max", "mean_abs", "hessian"]


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("memory", [1 << 40, 0], ids=["memory", "file"])
@pytest.mark.parametrize("stop", ["layer 1", "layer 3", "output"])
def test_a_resumed_run_gives_the_same_bytes(
    stop: str, memory: int, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint("gemma3")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run(folder, whole / "m.gguf", collect=EVERYTHING)
    options: dict[str, Any] = {"collect": EVERYTHING, "max_memory": memory}
    assert run(folder, broken / "m.gguf", stop_in=stop, **options) is None
    assert not (broken / "m.gguf").exists()
    run(folder, broken / "m.gguf", resume=True, **options)
    assert _digests(broken) == _digests(whole)
    assert len(_digests(whole)) == 2


def test_an_unfinished_run_is_not_overwritten_or_continued_with_other_settings(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from quantcli.errors import OutputError, SourceError

    folder, output = checkpoint("gemma3"), tmp_path / "m.gguf"
    run(folder, output, stop_in="layer 2")
    with pytest.raises(OutputError, match="interrupted calibration") as refused:
        run(folder, output)
    assert refused.value.hint is not None
    assert "--resume" in refused.value.hint
    with pytest.raises(SourceError, match="begun with another text or cut of it"):
        run(folder, output, resume=True, chunks=5)
    with pytest.raises(SourceError, match="begun with another choice of statistics"):
        run(folder, output, resume=True, collect=["abs_max"])
    with pytest.raises(SourceError, match="begun with another model"):
        run(checkpoint("llama"), output, resume=True)
    run(folder, output, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def _two_texts(tmp_path: Path) -> list[Path]:
    content = TEXT.read_text()
    paths = [tmp_path / "first.txt", tmp_path / "second.txt"]
    paths[0].write_text(content[:2000])
    paths[1].write_text(content[2000:])
    return paths


def test_merged_calibrations_are_that_of_all_texts(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    from quantcli.calibration import load, merge

    folder, texts = checkpoint("mixtral"), _two_texts(tmp_path)
    outputs = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for text, output in zip(texts, outputs, strict=True):
        run(folder, output, data=[str(text)], chunks=None, collect=EVERYTHING)
    run(folder, tmp_path / "all.gguf", data=list(map(str, texts)), chunks=None, collect=EVERYTHING)
    for _ in merge(outputs, tmp_path / "sum.gguf"):
        pass
    for _ in merge(outputs[::-1], tmp_path / "mus.gguf"):
        pass
    wanted, found = load(tmp_path / "all.gguf"), load(tmp_path / "sum.gguf")
    turned = load(tmp_path / "mus.gguf")
    assert (found.chunks, found.datasets) == (wanted.chunks, wanted.datasets)
    parts = [load(output) for output in outputs]
    for name, squares in wanted.squares.items():
        assert (found.counts[name] == wanted.counts[name]).all()
        # Exactly the sum of what the files hold, and within their rounding the whole run's.
        exact = (parts[0].squares[name] + parts[1].squares[name]).astype(np.float32)
        assert (found.squares[name] == exact).all()
        assert (turned.squares[name] == exact).all()
        np.testing.assert_allclose(found.squares[name], squares, rtol=3e-7)
    whole = load_file(tmp_path / "all.stats.safetensors")
    total = load_file(tmp_path / "sum.stats.safetensors")
    assert whole.keys() == total.keys()
    for name, value in whole.items():
        scale = np.abs(value).max()
        # Inputs of several windows are multiplied at once in float32, others together than before.
        assert np.abs(total[name].astype(float) - value).max() <= 1e-6 * scale, name


def test_calibrations_of_other_models_do_not_add_up(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from quantcli.calibration import merge
    from quantcli.errors import SourceError

    run(checkpoint("llama"), tmp_path / "a.gguf")
    run(checkpoint("gemma3"), tmp_path / "b.gguf")
    with pytest.raises(SourceError, match="has shape"):
        for _ in merge([tmp_path / "a.gguf", tmp_path / "b.gguf"], tmp_path / "c.gguf"):
            pass
    assert not (tmp_path / "c.gguf").exists()


def test_few_tokens_are_made_up_for_by_the_layers_mean() -> None:
    from quantcli.sources.imatrix import shrink

    sums = np.array([[512.0, 1024.0], [100.0, 300.0], [0.0, 0.0]], np.float32)
    counts = np.array([512, 128, 0], np.float32)
    raw, drawn = shrink(sums, counts, 0), shrink(sums, counts, 512)
    common = sums.sum(0) / 640
    np.testing.assert_allclose(raw, [[1, 2], [100 / 128, 300 / 128], [1, 1]])
    np.testing.assert_allclose(drawn[0], raw[0])
    np.testing.assert_allclose(drawn[1], 0.25 * raw[1] + 0.75 * common, rtol=1e-6)
    np.testing.assert_allclose(drawn[2], common, rtol=1e-6)
