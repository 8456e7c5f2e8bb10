"""The torch kernels against the native ones, on the problems that the native ones are tested on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from support.descent_cases import make
from support.descent_problem import Problem
from support.kernel_cases import FEEDBACK, FEEDBACK_POINTS, SWEEP, SWEEP_POINTS

from quantcli import _native
from quantcli.rounding.device import fused_kernels
from quantcli.rounding.device.point_kernels import TensorPoints, TensorVectorKernels
from quantcli.rounding.device.scalar_kernels import TensorScalarKernels
from quantcli.rounding.kernels import ScalarKernels

CPU = torch.device("cpu")
PROBLEMS = make()


def _of(operation: int) -> list[Any]:
    return [pytest.param(p, id=p.label) for p in PROBLEMS if p.operation == operation]


def _scalar(given: dict[str, Any]) -> TensorScalarKernels:
    kernels = ScalarKernels(
        given["levels"], given["uniform"], given["sub"], given.get("block"),
        given.get("half", False), given.get("scale_range", (1, 1)), given.get("min_range", (0, 0)),
    )  # fmt: skip
    return TensorScalarKernels.of(kernels, CPU)


def _tensor(values: np.ndarray | None) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values.copy())


@pytest.mark.parametrize("problem", _of(FEEDBACK))
def test_feedback_is_the_native_kernel_s_bit_by_bit(problem: Problem) -> None:
    given = dict(problem.arguments)
    codes, errors = given["codes"].copy(), given["errors"].copy()
    _native.feedback(**given | {"codes": codes, "errors": errors})
    names = ("target", "weights", "factor", "steps", "lows")
    found = _scalar(given).feedback(given["sub"], *(_tensor(given[name]) for name in names))
    # Where a step is zero the code says nothing, and the encoder's stays.
    said = (given["steps"] != 0).repeat(given["sub"], axis=1)
    np.testing.assert_array_equal(found[0].numpy()[said], codes[said])
    np.testing.assert_array_equal(found[1].numpy(), errors)


@pytest.mark.parametrize("problem", _of(SWEEP))
def test_sweeps_are_the_native_kernel_s(problem: Problem) -> None:
    """Codes bit by bit; scales, whose sums are in another order, but for ties."""
    given = dict(problem.arguments)
    want = {n: given[n].copy() for n in ("codes", "d", "scales", "dmin", "mins") if n in given}
    _native.sweep(**given | want)
    kernels = _scalar(given)
    codes, held = kernels.sweep(
        *(_tensor(given.get(n)) for n in ("hessian", "gradient", "codes", "d", "scales")),
        _tensor(given.get("dmin")), _tensor(given.get("mins")), change_scales=given["scales_too"],
    )  # fmt: skip
    np.testing.assert_array_equal(codes.numpy(), want["codes"])
    for name in ("d", "scales", "dmin", "mins"):
        if name in want:
            differs = getattr(held, name).numpy() != want[name]
            # Sums that overflow do so in their own order.
            most = 0.05 if "steep" in problem.label else 0.01
            assert differs.mean() <= (most if given["scales_too"] else 0), name


FEW = [
    problem
    for problem in PROBLEMS
    if problem.operation in (FEEDBACK, SWEEP) and ", 1 x" in problem.label
]
"""Those of one row, since the interpreter of Triton takes seconds for more."""


@pytest.mark.slow
@pytest.mark.parametrize("problem", FEW, ids=lambda problem: problem.label)
# The interpreter is NumPy, which tells of divisions by zero.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_fused_kernels_are_the_native_ones(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    from quantcli.rounding.device import triton_kernels

    monkeypatch.setattr(fused_kernels, "find", lambda device: triton_kernels)
    if problem.operation == FEEDBACK:
        test_feedback_is_the_native_kernel_s_bit_by_bit(problem)
    else:
        test_sweeps_are_the_native_kernel_s(problem)


def _points(given: dict[str, Any]) -> TensorVectorKernels:
    width = 8 if given["signs"] == "even" else 2 * given["first"].shape[1]
    grid = (given[name] for name in ("first", "second", "patterns", "signs", "apart"))
    points = TensorPoints.make(*grid, width, CPU)
    limits = given.get("scale_range", (1, given.get("most", 1)))
    return TensorVectorKernels(points, given["sub"], given.get("block", 0), limits)


@pytest.mark.parametrize("problem", _of(FEEDBACK_POINTS))
def test_feedback_of_points_is_the_native_kernel_s_bit_by_bit(problem: Problem) -> None:
    given = dict(problem.arguments)
    want = {name: given[name].copy() for name in ("codes", "errors", "scales")}
    _native.feedback_points(**given | want)
    names = ("target", "weights", "factor", "metric")
    codes, errors, scales = _points(given).feedback(
        given["sub"], given["spread"], *(_tensor(given[name]) for name in names),
        _tensor(given["d"])[:, None], _tensor(given["scales"]), _tensor(given["norms"]),
    )  # fmt: skip
    said = given["d"] != 0
    np.testing.assert_array_equal(codes.numpy()[said], want["codes"][said])
    np.testing.assert_array_equal(errors.numpy(), want["errors"])
    np.testing.assert_array_equal(scales.numpy()[said], want["scales"][said])


@pytest.mark.parametrize("problem", _of(SWEEP_POINTS))
def test_sweeps_of_points_are_the_native_kernel_s(problem: Problem) -> None:
    given = dict(problem.arguments)
    want = {name: given[name].copy() for name in ("codes", "d", "scales")}
    _native.sweep_points(**given | want)
    codes, held = _points(given).sweep(
        *(_tensor(given[n]) for n in ("hessian", "gradient", "codes", "d", "scales")),
        change_scales=given["scales_too"], norms=_tensor(given["norms"]),
    )  # fmt: skip
    if "steep" not in problem.label:
        np.testing.assert_array_equal(codes.numpy(), want["codes"])
    for name in ("d", "scales"):
        differs = getattr(held, name).numpy() != want[name]
        most = 0.05 if "steep" in problem.label else 0.01
        assert differs.mean() <= (most if given["scales_too"] else 0), name
