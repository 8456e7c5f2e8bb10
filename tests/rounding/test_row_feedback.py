"""Feedback between rows: GPTQ of the whole matrix under the Kronecker product of both Hessians."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

pytest.importorskip("torch")

from quantcli.formats import get_format, native
from quantcli.formats.integer import IntegerGrid
from quantcli.rounding import row_feedback as rows_module
from quantcli.rounding.codecs import BlockCodec, GridCodec, WeightCodec
from quantcli.rounding.gptq import GPTQ
from quantcli.rounding.options import Options
from quantcli.rounding.row_feedback import round_by_rows
from quantcli.rounding.tensor import round_matrix
from quantcli.statistics import output_fisher as outputs_module
from quantcli.statistics.hessian import Hessian, prepare_hessian
from quantcli.statistics.matrix_statistics import MatrixStatistics
from quantcli.statistics.output_fisher import OutputFisher, cut_strips
from quantcli.workers import Workers

POOL = Workers()
STEP = 0.02


def _mean(size: int, seed: int, spread: float = 1.0) -> np.ndarray:
    """A mean of outer products of correlated vectors of unequal size."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((6 * size, size // 2)) @ draw.standard_normal((size // 2, size))
    values += 0.3 * draw.standard_normal(values.shape)
    values *= np.exp(spread * draw.standard_normal(size))
    return (values.T @ values / len(values)).astype(np.float32)


@dataclass
class Fixed:
    """Codes -8 ... 7 of one step, rounded with feedback along the row: a codec for tests."""

    by_rows = True

    def decode(self, packed: np.ndarray) -> np.ndarray:
        return (packed.astype(np.float32) - 8) * np.float32(STEP)

    def descend(
        self, rows: np.ndarray, hessian: Hessian, importance: np.ndarray, options: Options,
        pool: Workers,
    ) -> np.ndarray:  # fmt: skip
        codes, errors = np.zeros(rows.shape, np.uint8), np.zeros(rows.shape)
        for j in range(rows.shape[1]):
            aim = rows[:, j] + errors[:, :j] @ hessian.factor[:j, j]
            codes[:, j] = np.clip(np.rint(aim / STEP), -8, 7) + 8
            errors[:, j] = rows[:, j] - (codes[:, j] - 8.0) * STEP
        return codes


def _textbook(weights: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """GPTQ as its paper has it, for a vector of weights in its order, in float64."""
    work, inverse = weights.astype(np.float64), np.linalg.inv(metric)
    codes = np.zeros(len(weights), np.int64)
    for j in range(len(weights)):
        codes[j] = np.clip(np.rint(work[j] / STEP), -8, 7)
        error = (work[j] - codes[j] * STEP) / inverse[j, j]
        work -= error * inverse[j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes + 8


def test_it_is_the_textbook_s_gptq_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_LEAST", 1)
    rows, columns = 10, 24
    weights = (0.05 * np.random.default_rng(1).standard_normal((rows, columns))).astype(np.float32)
    hessian = prepare_hessian(_mean(columns, 2))
    found = OutputFisher(rows, (_mean(rows, 3),))
    packed = round_by_rows(
        Fixed(), weights, hessian, np.ones(columns, np.float32), found, Options(sweeps=0), POOL
    )  # type: ignore[arg-type]
    fisher = found.prepared[0]
    order = fisher.order
    assert order is not None
    assert (np.diff(fisher.matrix.diagonal()[order]) <= 0).all()
    both = np.kron(fisher.matrix[np.ix_(order, order)].astype(np.float64), hessian.matrix)
    wanted = _textbook(weights[order].reshape(-1), both).reshape(rows, columns)
    assert (packed[order] != wanted).mean() < 0.01
    # And it is not what rows by themselves give.
    alone = Fixed().descend(weights, hessian, weights[0], Options(), POOL)
    assert (packed != alone).mean() > 0.1


CODECS: dict[str, WeightCodec] = {
    "Q2_K": BlockCodec(get_format("Q2_K")),
    "Q4_0": BlockCodec(get_format("Q4_0")),
    "IQ2_S": BlockCodec(get_format("IQ2_S")),
    "int3": GridCodec(IntegerGrid(3, False, "group", 64), "int3"),
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("strip", [4096, 40])
def test_it_costs_predictions_less(name: str, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs_module, "STRIP", strip)
    rows, columns = 96, 256
    weights = (0.02 * np.random.default_rng(5).standard_t(5, (rows, columns))).astype(np.float32)
    mean, fisher = _mean(columns, 6), _mean(rows, 7, 0.5)
    means = tuple(fisher[strip, strip] for strip in cut_strips(rows))
    found = OutputFisher(rows, means)
    known = MatrixStatistics(prepare_hessian(mean), mean, mean, outputs=found)
    codec = CODECS[name]
    both = round_matrix(GPTQ, codec, weights, known, Options(), POOL)
    alone = codec.descend(weights, known.hessian, known.importance, Options(sweeps=3), POOL)
    share = known.cost(weights - codec.decode(alone), found) / known.cost(weights, found)
    assert both.after < (0.95 if strip > rows else 1.0) * share
    assert both.after < 0.8 * both.before
    assert not both.kept
    # What was taken is what its loss was told of.
    cost = known.cost(weights - codec.decode(both.packed), found) / known.cost(weights, found)
    assert both.after == pytest.approx(cost, rel=1e-5)


def test_the_last_sweep_lowers_the_loss() -> None:
    rows, columns = 64, 256
    weights = (0.02 * np.random.default_rng(8).standard_normal((rows, columns))).astype(np.float32)
    hessian, codec = prepare_hessian(_mean(columns, 9)), CODECS["Q4_0"]
    found = OutputFisher(rows, (_mean(rows, 10, 0.5),))
    fisher = found.prepared[0].matrix

    def cost(packed: np.ndarray) -> float:
        errors = (weights - native.decode(get_format("Q4_0"), packed)).astype(np.float64)
        return float(((fisher @ errors @ hessian.matrix) * errors).sum())

    ones, costs = np.ones(columns, np.float32), []
    for sweeps in (1, 0):
        options = Options(sweeps=sweeps)
        costs.append(cost(round_by_rows(codec, weights, hessian, ones, found, options, POOL)))
    assert costs[0] < costs[1]


def test_a_grid_with_one_scale_is_rounded_as_a_whole() -> None:
    codec = GridCodec(IntegerGrid(8, True, "tensor", None), "int8")
    weights = (0.02 * np.random.default_rng(5).standard_normal((32, 64))).astype(np.float32)
    mean = _mean(64, 6)
    known = MatrixStatistics(
        prepare_hessian(mean), mean, mean, outputs=OutputFisher(32, (_mean(32, 7),))
    )
    found = round_matrix(GPTQ, codec, weights, known, Options(), POOL)
    assert len(np.unique(codec.unpack(found.packed).scales)) == 1
