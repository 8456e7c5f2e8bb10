"""AWQ's scales lower the output error of the codes that llama.cpp itself would write."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import ggml
from support.folds import random_folds
from support.measured import Drawn, calibrated

from quantcli.archs.fold import FoldGroup
from quantcli.errors import PlanError
from quantcli.formats import get_format
from quantcli.formats.integer import IntegerGrid
from quantcli.model import Model, open_model
from quantcli.statistics.hessian import prepare_hessian
from quantcli.statistics.input_statistics import InputStatistics
from quantcli.transforms.awq import AWQ
from quantcli.transforms.base import TransformFound, TransformOptions
from quantcli.transforms.chain import TransformsApplied, transform_model
from quantcli.transforms.channel_scales import model_groups
from quantcli.transforms.output_error import (
    ConsumerMatrix,
    RoundRows,
    block_grid,
    block_grids,
    folder_grid,
)
from quantcli.transforms.reorder import REORDER
from quantcli.transforms.spec import Operation, dump_transform
from quantcli.transforms.transformed_model import apply_transform
from quantcli.transforms.transformed_statistics import TransformedStatistics
from quantcli.types import Note

pytestmark = pytest.mark.slow

pytest.importorskip("torch")


def search(
    model: Model, grids: Mapping[str, RoundRows], measured: InputStatistics, **options: Any
) -> TransformFound:
    *_, found = AWQ.find(model, grids, measured, TransformOptions(**options))
    assert isinstance(found, TransformFound)
    return found


def matrices(model: Model) -> list[str]:
    return [
        tensor.name
        for tensor in model.tensors
        if len(tensor.shape) > 1 and not tensor.name.startswith(("token", "position"))
    ]


def four_bits(rows: NDArray[np.float32], _: object = None) -> NDArray[np.float32]:
    """Symmetric four bits with a float32 scale for each 32 columns, by hand."""
    groups = rows.reshape(len(rows), -1, 32)
    scale = np.maximum(np.abs(groups).max(axis=2, keepdims=True), 1e-20) / 7.5
    return (np.clip(np.rint(groups / scale), -8, 7) * scale).reshape(rows.shape)


def group_loss(
    model: Model,
    group: FoldGroup,
    measured: InputStatistics,
    rounded: Callable[..., NDArray[np.float32]],
    operations: Mapping[str, Operation] = MappingProxyType({}),
) -> float:
    """The output error of a group's consumers, each as a part of its output, over what they see.

    An output that ``operations`` scale, being channels of the next group, is taken as it was.
    """
    tensors = {tensor.name: tensor for tensor in model.tensors}
    total, seen = 0.0, 0
    for name in group.consumers:
        tensor = tensors[name]
        if tensor.name.endswith("gate_inp.weight"):
            continue
        stack = tensor.shape[0] if len(tensor.shape) > 2 else 1
        each = tensor.rows // stack
        for matrix in range(stack):
            rows = model.read_floats(tensor, matrix * each, (matrix + 1) * each)
            hessian = measured.hessian(name, matrix).astype(np.float64)
            importance = np.ascontiguousarray(hessian.diagonal(), np.float32)
            error = rounded(rows, importance).astype(np.float64) - rows
            factors = operations.get(name, Operation()).rows
            if factors is not None:
                error /= factors[matrix * each : (matrix + 1) * each, None]
                rows = rows / factors[matrix * each : (matrix + 1) * each, None]
            squares = [float(np.einsum("rc,cd,rd->", x, hessian, x)) for x in (error, rows)]
            if squares[1]:
                total += measured.count(name, matrix) * squares[0] / squares[1]
                seen += measured.count(name, matrix)
    return total / seen


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q2_K", "Q4_K", "IQ4_NL"])
def test_no_group_of_a_model_gets_worse(name: str, checkpoint: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp")
    kind = get_format(name).type_id

    def rounded(rows: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
        return ggml.dequantize(kind, ggml.quantize(kind, rows, weights))

    with open_model(checkpoint("llama"), vocabulary=False) as model:
        columns = {tensor.name: tensor.columns for tensor in model.tensors}
        measured = Drawn(columns)
        names = matrices(model)
        found = search(model, block_grids(dict.fromkeys(names, name)), measured)
        changed = apply_transform(model, found.transform)
        after = TransformedStatistics(measured, found.transform)
        losses = [
            [group_loss(model, group, measured, rounded) for group in model_groups(model)],
            [
                group_loss(changed, group, after, rounded, found.transform.operations)
                for group in model_groups(model)
            ],
        ]
    told = {outcome.group: outcome for outcome in found.outcomes}
    for group, before, now in zip(model_groups(model), *losses, strict=True):
        outcome = told[group.name]
        # Float32 sums differ between the two; a group without scales has not changed at all.
        assert now <= before * (1 + 1e-3)
        assert now / before == pytest.approx(outcome.after / outcome.before, rel=2e-3)
        assert bool(outcome.choice) == (outcome.after < 0.99 * outcome.before)
    assert sum(losses[1]) < 0.97 * sum(losses[0]), "channels this unequal have something to gain"


@pytest.mark.parametrize("name", ["mixtral", "gemma3", "gpt2"])
def test_a_flat_grid_gains_on_measured_inputs(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with (
        open_model(checkpoint(name)) as model,
        calibrated(model, tmp_path / "m.gguf") as measured,
    ):
        names = [n for n in matrices(model) if "gate_inp" not in n]
        found = search(model, dict.fromkeys(names, four_bits), measured, weighted=False)
        changed = apply_transform(model, found.transform)
        after = TransformedStatistics(measured, found.transform)
        for group in model_groups(model):
            before = group_loss(model, group, measured, four_bits)
            operations = found.transform.operations
            now = group_loss(changed, group, after, four_bits, operations)
            assert now <= before * (1 + 1e-3), group.name
    assert sum(outcome.after for outcome in found.outcomes) < 0.97 * sum(
        outcome.before for outcome in found.outcomes
    )


def test_an_integer_grid_is_searched_as_it_is_written(checkpoint: Callable[..., Path]) -> None:
    grid = IntegerGrid(bits=4, group_size=32)
    with open_model(checkpoint("llama"), vocabulary=False) as model:
        measured = Drawn({tensor.name: tensor.columns for tensor in model.tensors})
        grids = dict.fromkeys(matrices(model), folder_grid(grid))
        found = search(model, grids, measured, weighted=False)
        changed = apply_transform(model, found.transform)
        after = TransformedStatistics(measured, found.transform)
        rounded = folder_grid(grid)
        for group in model_groups(model):
            before = group_loss(model, group, measured, rounded)
            now = group_loss(changed, group, after, rounded, found.transform.operations)
            assert now <= before * (1 + 1e-3), group.name
    assert any(outcome.choice for outcome in found.outcomes)
    with pytest.raises(PlanError, match="one scale for a whole tensor"):
        folder_grid(IntegerGrid(bits=8, strategy="tensor"))


@pytest.mark.parametrize("feedback", [False, True])
def test_channels_of_one_size_come_to_share_a_scale(
    feedback: bool, checkpoint: Callable[..., Path]
) -> None:
    with open_model(checkpoint("llama"), vocabulary=False) as even:
        model = apply_transform(even, random_folds(even))
        measured = Drawn({tensor.name: tensor.columns for tensor in model.tensors})
        gated = [group for group in model_groups(model) if group.kind == "gated"]
        down = [group.consumers[0] for group in gated]
        grids = dict.fromkeys(down, four_bits)
        options = TransformOptions(weighted=False, feedback=feedback)
        *_, note, found = REORDER.find(model, grids, measured, options)
        assert isinstance(note, Note)
        assert isinstance(found, TransformFound)
        assert found.transform.rotations.keys() == {group.name for group in gated}
        changed = apply_transform(model, found.transform)
        after = TransformedStatistics(measured, found.transform)
        losses = []
        for one, known in ((model, measured), (changed, after)):
            if feedback:
                known = _Pivots(known)
            losses.append([group_loss(one, group, known, four_bits) for group in gated])
    assert all(now < before for before, now in zip(*losses, strict=True))
    said = float(re.findall(r"error that they lead to is (\S+) times", note.message)[0])
    assert said < 0.9
    if not feedback:
        assert sum(losses[1]) / sum(losses[0]) == pytest.approx(said, abs=0.006)
    assert f"channels of {len(gated)} of {len(gated)} MLPs" in note.message


def test_with_groups_under_one_scale_an_order_comes_before_scales(
    checkpoint: Callable[..., Path],
) -> None:
    with open_model(checkpoint("llama"), vocabulary=False) as even:
        model = apply_transform(even, random_folds(even))
        measured = Drawn({tensor.name: tensor.columns for tensor in model.tensors})
        grids = dict.fromkeys(matrices(model), four_bits)
        for groups, wanted in ((False, ["awq"]), (True, ["reorder", "awq"])):
            settings = TransformOptions(weighted=False, groups=groups)
            *_, chained = transform_model(model, ["awq"], grids, measured, settings)
            assert isinstance(chained, TransformsApplied)
            assert [transform.method for transform in chained.transforms] == wanted


class _Pivots:
    """Only what columns after a column cannot make good weighs in the errors."""

    def __init__(self, measured: InputStatistics) -> None:
        self._measured = measured

    def count(self, name: str, matrix: int = 0) -> int:
        return self._measured.count(name, matrix)

    def hessian(self, name: str, matrix: int = 0) -> NDArray[np.float32]:
        return np.diag(prepare_hessian(self._measured.hessian(name, matrix)).pivots)


def test_an_order_that_does_not_help_is_not_taken(checkpoint: Callable[..., Path]) -> None:
    exact: list[NDArray[np.float32]] = []

    def spoilt_by_order(rows: NDArray[np.float32], _: object = None) -> NDArray[np.float32]:
        known = any(np.isin(rows, whole).all() and rows[0, 0] in whole[:, 0] for whole in exact)
        return rows if known else np.asarray(np.rint(rows * 8) / 8, np.float32)

    with open_model(checkpoint("llama"), vocabulary=False) as model:
        measured = Drawn({tensor.name: tensor.columns for tensor in model.tensors})
        down = [group.consumers[0] for group in model_groups(model) if group.kind == "gated"]
        tensors = {tensor.name: tensor for tensor in model.tensors}
        exact += [model.read_floats(tensors[name], 0, tensors[name].rows) for name in down]
        grids = dict.fromkeys(down, spoilt_by_order)
        options = TransformOptions(weighted=False)
        *_, note, found = REORDER.find(model, grids, measured, options)
    assert isinstance(found, TransformFound)
    assert not found.transform.operations
    assert not found.transform.rotations
    assert f" 0 of {len(down)} MLPs" in note.message


def test_the_same_for_any_number_of_threads(checkpoint: Callable[..., Path]) -> None:
    with open_model(checkpoint("qwen3"), vocabulary=False) as model:
        measured = Drawn({tensor.name: tensor.columns for tensor in model.tensors})
        grids = block_grids(dict.fromkeys(matrices(model), "Q4_0"))
        files = [
            dump_transform(search(model, grids, measured, threads=n).transform) for n in (1, 1, 3)
        ]
    assert files[0] == files[1] == files[2]


def test_what_is_exact_stays_as_it_is(checkpoint: Callable[..., Path]) -> None:
    with open_model(checkpoint("llama"), vocabulary=False) as model:
        measured = Drawn({tensor.name: tensor.columns for tensor in model.tensors})
        found = search(model, block_grids(dict.fromkeys(matrices(model), "F32")), measured)
        assert not found.transform.operations
        assert not search(model, {}, measured).outcomes


def test_scales_that_a_type_cannot_hold_lose(checkpoint: Callable[..., Path]) -> None:
    """A weight that is no number is the pipeline's to report, with its place."""
    with open_model(checkpoint("llama"), vocabulary=False) as model:
        eye = np.eye(64, dtype=np.float32)
        consumer = ConsumerMatrix(model, model.tensors[-1], 0, lambda *_: eye, block_grid("Q4_0"))
        rows = np.full((2, 64), 3e38, np.float32)
        assert consumer.error(rows, np.ones(64)) == np.inf
