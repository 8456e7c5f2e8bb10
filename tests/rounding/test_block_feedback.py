"""Error feedback and descent, against a textbook GPTQ and the losses that they promise."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from support.schur import remaining

from quantcli import _native
from quantcli.errors import SourceError
from quantcli.formats import get_format, native
from quantcli.formats.codebook_lattice import CODEBOOKS
from quantcli.formats.lattice import LATTICES
from quantcli.rounding.block_feedback import round_with_feedback
from quantcli.rounding.descent import sweep
from quantcli.rounding.encoded_columns import encode_columns
from quantcli.rounding.packed_matrix import PackedMatrix
from quantcli.rounding.scalar_codebook import ScalarCodebook
from quantcli.statistics.hessian import output_error, prepare_hessian
from quantcli.workers import Workers, workers

POOL = Workers()


def _problem(
    columns: int, rows: int = 48, seed: int = 3
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Heavy-tailed weights, and the mean of x x^T of correlated inputs with two loud channels."""
    draw = np.random.default_rng(seed)
    inputs = draw.standard_normal((4 * columns, columns // 4)) @ draw.standard_normal(
        (columns // 4, columns)
    )
    inputs += 0.3 * draw.standard_normal(inputs.shape)
    inputs[:, :2] *= 8
    weights = (draw.standard_t(5, (rows, columns)) * 0.03).astype(np.float32)
    mean = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    return weights, mean, np.ascontiguousarray(mean.diagonal())


def _textbook(weights: np.ndarray, hessian: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """GPTQ as its paper has it: the inverse Hessian, column by column, in float64.

    Levels are -8 ... 7 times ``scale`` (rows, columns).
    """
    work = weights.astype(np.float64)
    inverse = np.linalg.inv(hessian.astype(np.float64))
    codes = np.zeros(weights.shape, np.int64)
    for j in range(weights.shape[1]):
        codes[:, j] = np.clip(np.rint(work[:, j] / scale[:, j]), -8, 7)
        error = (work[:, j] - codes[:, j] * scale[:, j]) / inverse[j, j]
        work -= error[:, None] * inverse[j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_it_is_the_textbook_s_gptq_on_a_flat_grid(order: str) -> None:
    columns = 96
    weights, mean, _ = _problem(columns, rows=16)
    hessian = prepare_hessian(mean, order=order)
    scale = np.full((16, columns), 0.011)
    chosen = np.arange(columns) if hessian.order is None else hessian.order
    assert (order == "natural") == (hessian.order is None)
    want = _textbook(weights[:, chosen], hessian.matrix[np.ix_(chosen, chosen)], scale)
    lattice = LATTICES["Q4_0"]
    steps = scale[:, : columns // 32].astype(np.float32)
    found, errors = ScalarCodebook.of(lattice).feed_back(
        32, weights[:, chosen], weights[:, chosen], hessian.part(slice(0, columns)), steps,
        np.zeros_like(steps), POOL,
    )  # fmt: skip
    np.testing.assert_array_equal(lattice.levels[found], want)
    np.testing.assert_allclose(errors, weights[:, chosen] - want * scale, atol=1e-7)


def _loss(packed: np.ndarray, name: str, weights: np.ndarray, mean: np.ndarray) -> float:
    return output_error(weights - native.decode(get_format(name), packed), mean)


@pytest.mark.parametrize("name", LATTICES)
def test_feedback_beats_the_encoder_and_sweeps_never_raise_the_loss(name: str) -> None:
    fmt = get_format(name)
    weights, mean, importance = _problem(512)
    hessian = prepare_hessian(mean)
    plain = _loss(encode_columns(fmt, weights, importance, POOL), name, weights, mean)
    coded = round_with_feedback(fmt, weights, hessian, importance, POOL)
    losses = [output_error(coded.errors, hessian.matrix)]
    for _ in range(3):
        sweep(coded, hessian)
        losses.append(output_error(coded.errors, hessian.matrix))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses))
    found = _loss(coded.pack(), name, weights, mean)
    assert found < 0.9 * plain
    # What is stored is what was counted.
    np.testing.assert_array_equal(weights - native.decode(fmt, coded.pack()), coded.errors)


@pytest.mark.parametrize("name", [*LATTICES, *CODEBOOKS])
def test_sweeps_before_later_columns_lower_what_those_cannot_make_good(name: str) -> None:
    fmt = get_format(name)
    weights, mean, importance = _problem(512)
    hessian = prepare_hessian(mean)
    remains = remaining(hessian.matrix, 256)
    lost, whole = [], []
    for block_sweeps in range(3):
        errors = round_with_feedback(fmt, weights, hessian, importance, POOL, block_sweeps).errors
        lost.append(output_error(errors[:, :256], remains))
        whole.append(output_error(errors, hessian.matrix))
    assert lost[2] <= lost[1] < lost[0]
    assert whole[2] < whole[0]


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "IQ4_XS", "Q8_0"])
def test_order_by_activation_beats_the_encoder_too(name: str) -> None:
    fmt = get_format(name)
    weights, mean, importance = _problem(256)
    hessian = prepare_hessian(mean, order="activation")
    plain = _loss(encode_columns(fmt, weights, importance, POOL), name, weights, mean)
    coded = round_with_feedback(fmt, weights, hessian, importance, POOL)
    assert _loss(coded.pack(), name, weights, mean) < plain


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_NL", "Q6_K"])
def test_codes_do_not_depend_on_threads_or_instruction_set(name: str) -> None:
    fmt = get_format(name)
    weights, mean, importance = _problem(256, rows=70)
    hessian = prepare_hessian(mean)
    active, packed = _native.isa(), []
    try:
        for isa in _native.available():
            _native.select(isa)
            for count in (1, 3):
                with workers(count) as pool:
                    coded = round_with_feedback(fmt, weights, hessian, importance, pool, 2)
                    sweep(coded, hessian)
                packed.append(coded.pack())
    finally:
        _native.select(active)
    for other in packed[1:]:
        np.testing.assert_array_equal(other, packed[0])


def _coded(name: str, weights: np.ndarray, importance: np.ndarray) -> PackedMatrix:
    """The encoder's own choice, ready for sweeps."""
    coded = PackedMatrix(get_format(name), weights)
    for index, columns in enumerate(coded.columns):
        part = np.ascontiguousarray(weights[:, columns])
        packed = encode_columns(coded.format, part, importance[columns], POOL)
        coded.set_parts(index, coded.split(packed))
    return coded


def test_a_sweep_finds_the_best_code_given_all_others() -> None:
    weights, mean, importance = _problem(64, rows=16)
    hessian = prepare_hessian(mean)
    coded = _coded("Q4_0", weights, importance)
    steps = np.repeat(coded.steps(coded.parts(0))[0], 32, axis=1).astype(np.float64)
    values = (weights - coded.errors).astype(np.float64)
    full = hessian.matrix.astype(np.float64)
    for j in range(64):
        best = values[:, j] + (weights - values) @ full[:, j] / full[j, j]
        values[:, j] = np.clip(np.rint(best / steps[:, j]), -8, 7) * steps[:, j]
    sweep(coded, hessian, scales=False)
    np.testing.assert_allclose(weights - coded.errors, values, atol=1e-6)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q5_1", "IQ4_XS"])
def test_scales_of_a_sweep_are_at_an_optimum(name: str) -> None:
    """After many sweeps no single integer scale, minimum or factor can be bettered alone."""
    weights, mean, importance = _problem(256, rows=16)
    hessian = prepare_hessian(mean)
    coded = _coded(name, weights, importance)
    before = output_error(coded.errors, hessian.matrix)
    sweep(coded, hessian, scales=False)
    codes_alone = output_error(coded.errors, hessian.matrix)
    for _ in range(20):
        sweep(coded, hessian)
    best = output_error(coded.errors, hessian.matrix)
    assert best < codes_alone < before
    lattice, parts = coded.lattice, coded.parts(0)
    tried = []
    for step in (-1, 1):
        if lattice.scale_range[0] < lattice.scale_range[1]:
            for sub in range(parts.scales.shape[1]):
                scales = parts.scales.copy()
                scales[:, sub] = np.clip(scales[:, sub] + step, *lattice.scale_range)
                tried.append(replace(parts, scales=scales))
        factor = np.float32(1 + step / 512)
        tried.append(replace(parts, d=(parts.d * factor).astype(np.float16).astype(np.float32)))
    start = _row_losses(coded.errors, hessian.matrix)
    for other in tried:
        coded.set_parts(0, other)
        assert (_row_losses(coded.errors, hessian.matrix) >= start * (1 - 1e-4)).all()


def _row_losses(errors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.einsum("ij,jk,ik->i", errors, matrix, errors, dtype=np.float64)


def test_a_dead_column_and_a_dependent_one_are_survived() -> None:
    weights, mean, importance = _problem(256)
    mean[5], mean[:, 5] = 0, 0
    mean[7], mean[:, 7] = mean[9], mean[:, 9]
    hessian = prepare_hessian(mean)
    assert np.isfinite(hessian.factor).all()
    coded = round_with_feedback(get_format("Q4_K"), weights, hessian, importance, POOL)
    assert np.isfinite(coded.errors).all()


def test_damping_is_raised_until_the_factorisation_succeeds() -> None:
    _, mean, _ = _problem(64)
    values, vectors = np.linalg.eigh(mean.astype(np.float64))
    values[0] = -0.05 * values.mean()
    broken = (vectors * values) @ vectors.T
    assert prepare_hessian(broken, damping=0.01).damping == pytest.approx(0.1)
    with pytest.raises(SourceError, match="positive definite"):
        # Correlations far beyond what the variances allow.
        prepare_hessian(np.eye(32) + 1e3 * (np.ones((32, 32)) - np.eye(32)) * -1)


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    mean = np.eye(32, dtype=np.float32)
    mean[3, 3] = np.nan
    with pytest.raises(SourceError, match="not finite"):
        prepare_hessian(mean)


def test_the_factor_gives_the_hessian_back() -> None:
    _, mean, _ = _problem(128)
    hessian = prepare_hessian(mean)
    factor = hessian.factor.astype(np.float64)
    assert np.allclose(np.tril(factor, -1), 0)
    pivots = np.linalg.solve(factor, np.linalg.solve(factor, hessian.matrix.T).T)
    np.testing.assert_allclose(pivots, np.diag(pivots.diagonal()), atol=1e-4 * pivots.max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sub": 7}, "runs of 7"),
        ({"levels": np.zeros(1, np.float32)}, "1 levels"),
        ({"steps": np.zeros((4, 3), np.float32)}, "steps has shape"),
        ({"codes": np.zeros((4, 32), np.uint8)}, "codes has shape"),
    ],
)
def test_the_binding_refuses_what_does_not_fit(change: dict[str, object], message: str) -> None:
    given = {
        "levels": np.arange(16, dtype=np.float32), "uniform": True, "sub": 32,
        "target": np.zeros((4, 64), np.float32), "weights": np.zeros((4, 64), np.float32),
        "factor": np.eye(64, dtype=np.float32), "steps": np.ones((4, 2), np.float32),
        "lows": np.zeros((4, 2), np.float32), "codes": np.zeros((4, 64), np.uint8),
        "errors": np.zeros((4, 64), np.float32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _native.feedback(**(given | change))
