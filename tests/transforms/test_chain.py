"""Chains of transforms: the function stays, the file says what was done, a rerun repeats it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.measured import Drawn
from support.transformed_logits import transformers_logits

from quantcli.errors import ArchitectureError, PlanError
from quantcli.model import Model, open_model
from quantcli.transforms.base import TRANSFORMS, TransformOptions
from quantcli.transforms.chain import (
    TransformsApplied,
    check_transforms,
    needed_statistics,
    transform_model,
)
from quantcli.transforms.output_error import block_grids
from quantcli.transforms.transformed_model import apply_transform
from quantcli.types import Note

pytest.importorskip("torch")

IDS = list(range(300, 340))


def chain(model: Model, *names: str) -> tuple[TransformsApplied, list[Note]]:
    inside = [t.name for t in model.tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    measured = Drawn({tensor.name: tensor.columns for tensor in model.tensors})
    grids = block_grids(dict.fromkeys(inside, "Q4_0"))
    *events, found = transform_model(model, names, grids, measured, TransformOptions(seed=1))
    assert isinstance(found, TransformsApplied)
    return found, [event for event in events if isinstance(event, Note)]


def test_a_chain_keeps_the_function_and_is_told_in_the_model(
    checkpoint: Callable[..., Path],
) -> None:
    with open_model(checkpoint("qwen3"), vocabulary=False) as model:
        found, notes = chain(model, "smoothquant", "rotate", "awq")
        again = model
        for transform in found.transforms:
            again = apply_transform(again, transform)
        expected, logits = (transformers_logits(one, IDS) for one in (model, found.model))
        assert np.abs(logits - expected).max() / expected.std() < 2e-5
        told = json.loads(str(found.model.metadata["quantcli.transforms"].value))
        assert [entry["method"] for entry in told] == ["smoothquant", "rotate", "awq"]
        assert told[1]["settings"]["seed"] == 1
        assert again.metadata == found.model.metadata
        for tensor in again.tensors:
            rows = [one.read_rows(tensor, 0, tensor.rows) for one in (again, found.model)]
            assert (rows[0] == rows[1]).all()
    assert [note.message.split()[0] for note in notes] == ["smoothquant", "awq"]


def test_a_transform_changes_what_a_calibration_continues(
    checkpoint: Callable[..., Path],
) -> None:
    """A run that was begun on the original is no beginning for the transformed model."""
    from quantcli.artifacts.fingerprint import fingerprint

    with open_model(checkpoint("llama"), vocabulary=False) as model:
        models = [model, chain(model, "rotate")[0].model, chain(model, "awq")[0].model]
        assert len({fingerprint(one) for one in models}) == 3


def test_what_cannot_work_is_refused_first(checkpoint: Callable[..., Path]) -> None:
    with open_model(checkpoint("llama"), vocabulary=False) as model:
        with pytest.raises(PlanError, match="smoothquant after rotate"):
            check_transforms(model, ["rotate", "smoothquant"])
        with pytest.raises(PlanError, match="awq needs a calibration"):
            list(transform_model(model, ["awq"], {}, None, TransformOptions()))
    with open_model(checkpoint("gemma2"), vocabulary=False) as model:
        with pytest.raises(ArchitectureError, match=r"\(gemma2\) cannot be rotated, because"):
            check_transforms(model, ["awq", "rotate"])
        check_transforms(model, ["awq", "smoothquant"])


def test_statistics_are_asked_for_once() -> None:
    assert needed_statistics(list(TRANSFORMS)) == ("hessian", "abs_max")
    assert needed_statistics(["rotate"]) == ()
