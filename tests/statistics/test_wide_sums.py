"""The statistics of a wide matrix, read from the sums' files, are those of the whole means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="sums are torch's")

import torch

from quantcli.layerwise.input_hooks import MatmulInput
from quantcli.statistics import layer_hessians
from quantcli.statistics.layer_hessians import HELD_OUT, HessianAccumulator
from quantcli.statistics.panel_hessian import PanelHessian
from quantcli.types import OutputTensor

COLUMNS, TOKENS, DAMPING = 320, 64, 0.05


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("windows", [9, 40])
def test_wide_statistics(
    windows: int, added: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few inputs correlations count for less; with many every eighth window is held out."""
    monkeypatch.setattr(layer_hessians, "WIDE", 256)
    tensor = OutputTensor("blk.0.ffn_down.weight", (8, COLUMNS), "BF16")
    draw = np.random.default_rng(windows)
    inputs = draw.standard_normal((windows, TOKENS, COLUMNS)).astype(np.float32)
    inputs += inputs[:, :, ::-1] * 0.5
    held = np.arange(windows) % HELD_OUT == HELD_OUT - 1
    more = [np.diag(draw.uniform(1, 2, COLUMNS)) for _ in range(2)]
    with HessianAccumulator(
        lambda name, matrix: [(tensor, 0)], tmp_path, "here", DAMPING, "natural"
    ) as sums:
        for number, rows in enumerate(inputs):
            product = MatmulInput("down", 0, torch.from_numpy(rows), ("down", 0))
            sums.watch(number)(product)
        if added:
            sums.add(*more)
        found = sums.of(tensor.name, 0)
        assert found is not None
        assert isinstance(found.hessian, PanelHessian)
        wanted = []
        for chosen in (~held, held):
            rows = inputs[chosen].reshape(-1, COLUMNS).astype(np.float64)
            wanted.append(rows.T @ rows / len(rows))
        share = min(1.0, (~held).sum() * TOKENS / (4 * COLUMNS))
        assert (share < 1) == (windows == 9) == bool(sums.notes)
        kept = wanted[0].diagonal().copy()
        wanted[0] *= share
        np.fill_diagonal(wanted[0], kept)
        if added:
            wanted = [mean + own for mean, own in zip(wanted, more, strict=True)]
        np.testing.assert_allclose(np.asarray(found.fit), wanted[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.asarray(found.held_out), wanted[1], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.importance, wanted[0].diagonal(), rtol=1e-4)
        damped = wanted[0] + DAMPING * wanted[0].diagonal().mean() * np.eye(COLUMNS)
        np.testing.assert_allclose(found.hessian.matrix, damped, rtol=1e-4, atol=1e-4)
        errors = draw.standard_normal((5, COLUMNS)).astype(np.float32)
        loss = np.trace(errors.astype(np.float64) @ wanted[1] @ errors.T)
        assert found.cost(errors, None) == pytest.approx(loss, rel=1e-5)
