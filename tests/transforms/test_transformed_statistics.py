"""What is said of a transformed model's inputs is what a calibration of it measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.folds import random_folds, random_orders
from support.measured import calibrated

from quantcli.errors import SourceError
from quantcli.model import Model, open_model
from quantcli.sources.imatrix import read_importance
from quantcli.transforms.rotate import rotate
from quantcli.transforms.spec import TransformSpec
from quantcli.transforms.transformed_model import apply_transform
from quantcli.transforms.transformed_statistics import TransformedStatistics, transform_importance

pytest.importorskip("torch")

Make = Callable[[Model], TransformSpec]


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "phi3"])
@pytest.mark.parametrize("make", [random_folds, random_orders, rotate])
def test_statistics_of_a_transformed_model(
    make: Make, name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with open_model(checkpoint(name)) as model:
        transform = make(model)
        changed = apply_transform(model, transform)
        with (
            calibrated(model, tmp_path / "before.gguf") as before,
            calibrated(changed, tmp_path / "after.gguf") as after,
        ):
            told = TransformedStatistics(before, transform)
            consumers = [t.name for t in changed.tensors if f"{t.name}.counts" in after.tensors]
            assert "output.weight" in consumers or make is not rotate
            for consumer in consumers:
                for matrix in range(after.tensors[f"{consumer}.counts"].shape[0]):
                    expected = after.hessian(consumer, matrix)
                    size = np.sqrt(expected.diagonal())
                    error = told.hessian(consumer, matrix) - expected
                    assert (np.abs(error) <= 1e-4 * np.outer(size, size) + 1e-12).all()
                    assert told.count(consumer, matrix) == after.count(consumer, matrix)
                    if make is not rotate:
                        for kind in ("abs_max", "mean_abs"):
                            found = getattr(told, kind)(consumer, matrix)
                            wanted = getattr(after, kind)(consumer, matrix)
                            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
            importance = read_importance(tmp_path / "before.gguf")
            found = transform_importance(importance, transform, before)
    expected = read_importance(tmp_path / "after.gguf")
    assert found.entries.keys() == expected.entries.keys()
    for consumer, values in expected.entries.items():
        if make is not rotate and "down_exps" in consumer:
            # Experts that saw little lean on the others, whose channels now have other scales.
            columns = transform.operations[consumer].columns
            values = importance.entries[consumer] / np.square(columns)
        bound = 1e-4 * values.max(axis=1, keepdims=True)
        assert (np.abs(found.entries[consumer] - values) <= bound).all(), consumer


def test_what_a_rotation_hides_is_said(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with open_model(checkpoint("llama")) as model:
        transform = rotate(model)
        with calibrated(model, tmp_path / "m.gguf", chunks=2) as measured:
            told = TransformedStatistics(measured, transform)
            with pytest.raises(SourceError, match="not known after a rotation"):
                told.abs_max("blk.0.attn_q.weight")
            with pytest.raises(SourceError, match="does not tell that of a rotated model"):
                transform_importance(read_importance(tmp_path / "m.gguf"), transform)
            with pytest.raises(SourceError, match="has no counts of nothing"):
                measured.hessian("nothing")
