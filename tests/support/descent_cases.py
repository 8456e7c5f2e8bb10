"""Cases for `tests/native/driver.c`: feedback and sweeps, on scalars and on points of a grid.

What a calibrated method hands the kernels, small: correlated inputs, weights with blocks that have
no step, more rows than lanes and fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import cycle, product
from typing import Any

import numpy as np
from support.descent_problem import Problem
from support.kernel_cases import FEEDBACK, FEEDBACK_POINTS, SWEEP, SWEEP_POINTS

from quantcli.formats.codebook_lattice import CODEBOOKS, SIGNS_SHIFT, CodebookLattice
from quantcli.formats.lattice import LATTICES, Lattice

ROWS = (1, 17, 50)
"""None is a multiple of any number of lanes."""
SPREADS = (0, 3)
_INTEGERS = replace(LATTICES["Q4_1"], block=48, sub=16, half=False)
"""What `quantcli.rounding.grid_feedback` makes of four bits in blocks of 48 columns."""

SCALARS: tuple[tuple[str, Lattice, int], ...] = (
    *((name, LATTICES[name], 256) for name in ("Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "TQ2_0")),
    *((name, LATTICES[name], 32) for name in ("Q4_0", "Q4_1")),
    *((name, LATTICES[name], 64) for name in ("Q4_0", "MXFP4", "NVFP4")),
    ("MXFP4", LATTICES["MXFP4"], 256),
    ("integers", _INTEGERS, 48),
)
"""Lattices and numbers of columns."""

POINTS: tuple[tuple[str, str], ...] = (
    *((name, lattice.signs) for name, lattice in CODEBOOKS.items()),
    ("IQ2_S", "none"),
)
"""Grids and the signs that their points have."""


def make() -> list[Problem]:
    """Problems for all four kernels."""
    return [*_scalars(), *_points()]


def smallest() -> list[Problem]:
    """One problem for each kernel, in which every buffer is read or written to its end."""
    chosen = {
        FEEDBACK: "IQ4_XS, feedback, 17 x 256",
        SWEEP: "Q4_1, sweep of codes and scales, 17 x 32",
        FEEDBACK_POINTS: "IQ3_XXS, even signs, feedback, 17 x 64, spread 0",
        SWEEP_POINTS: "IQ3_XXS, even signs, sweep of codes and scales, 17 x 256",
    }
    return [problem for problem in make() if problem.label == chosen[problem.operation]]


@cache
def _inputs(columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A Hessian, and its factor and pivots: H = factor * pivots * factor^T, factor I + U."""
    draw = np.random.default_rng(columns)
    inputs = draw.standard_normal((columns, columns // 4)) @ draw.standard_normal(
        (columns // 4, columns)
    )
    hessian = inputs.T @ inputs / columns
    hessian += np.eye(columns) * 0.05 * hessian.diagonal().mean()
    upper = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    edge = upper.diagonal()
    return (
        hessian.astype(np.float32),
        np.ascontiguousarray(upper / edge, np.float32),
        edge.astype(np.float32) ** 2,
    )


def _weights(draw: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Heavy-tailed weights; every fifth row is zeros."""
    weights = (draw.standard_t(5, (rows, columns)) * 0.03).astype(np.float32)
    weights[3::5] = 0
    return weights


def _factors(draw: np.random.Generator, rows: int, count: int, largest: float) -> np.ndarray:
    """Float16 factors for weights of about 0.1, none for every fifth row and some blocks more."""
    d = draw.uniform(0.05, 0.15, (rows, count)) / max(largest, 1)
    d[3::5] = 0
    d[draw.random(d.shape) < 0.1] = 0
    return d.astype(np.float16).astype(np.float32)


def _scalars() -> Iterator[Problem]:
    for (name, lattice, columns), rows in product(SCALARS, ROWS):
        draw = np.random.default_rng([rows, columns, *name.encode()])
        yield _feedback(draw, name, lattice, rows, columns)
        for scales_too in (False, True):
            yield _sweep(draw, name, lattice, rows, columns, scales_too)
    yield _feedback(np.random.default_rng(1), "integers", replace(_INTEGERS, sub=1), 17, 48)
    for name in ("Q4_K", "IQ4_XS"):
        yield _steep(_sweep(np.random.default_rng(2), name, LATTICES[name], 17, 256, True))


def _steep(problem: Problem) -> Problem:
    """The same where steps lead beyond what float16, and in places float32, can hold."""
    gradient = problem.arguments["gradient"] * np.float32(1e6)
    gradient[::2] *= np.float32(1e30)
    arguments = {**problem.arguments, "gradient": gradient}
    return replace(problem, label=f"{problem.label}, steep", arguments=arguments)


def _rising(lattice: Lattice) -> dict[str, Any]:
    levels = np.unique(lattice.levels).astype(np.float32)
    return {"levels": levels, "uniform": bool((np.diff(levels) == 1).all()), "sub": lattice.sub}


def _scales(draw: np.random.Generator, lattice: Lattice, rows: int, columns: int) -> dict[str, Any]:
    """d, scales, and dmin and mins where there are minimums, with steps of zero among them."""
    count, subs = columns // lattice.block, columns // lattice.sub
    low, high = lattice.scale_range
    scales = draw.integers(low, high + 1, (rows, subs)).astype(np.float32)
    if low <= 0 <= high:
        scales[draw.random(scales.shape) < 0.1] = 0
    found = {"scales": scales}
    found["d"] = _factors(draw, rows, count, high * float(np.abs(lattice.levels).max()))
    if lattice.min_range is not None:
        low, high = lattice.min_range
        found["mins"] = draw.integers(low, high + 1, (rows, subs)).astype(np.float32)
        found["dmin"] = _factors(draw, rows, count, 2 * high)
    return found


def _runs(found: dict[str, Any], factor: str, numbers: str) -> np.ndarray:
    """The products of factors and their integers, one for each run."""
    if factor not in found:
        return np.zeros_like(found["scales"])
    integers = found[numbers]
    return found[factor].repeat(integers.shape[1] // found[factor].shape[1], axis=1) * integers


def _feedback(
    draw: np.random.Generator, name: str, lattice: Lattice, rows: int, columns: int
) -> Problem:
    scales, weights = _scales(draw, lattice, rows, columns), _weights(draw, rows, columns)
    earlier = draw.standard_normal(weights.shape).astype(np.float32) * np.float32(0.01)
    earlier[::7] = 0
    arguments = _rising(lattice) | {
        "target": weights + earlier, "weights": weights, "factor": _inputs(columns)[1],
        "steps": _runs(scales, "d", "scales"), "lows": _runs(scales, "dmin", "mins"),
        "codes": np.zeros(weights.shape, np.uint8), "errors": np.zeros_like(weights),
    }  # fmt: skip
    return Problem(f"{name}, feedback, {rows} x {columns}", FEEDBACK, arguments)


def _sweep(
    draw: np.random.Generator, name: str, lattice: Lattice, rows: int, columns: int,
    scales_too: bool,
) -> Problem:  # fmt: skip
    hessian, scales = _inputs(columns)[0], _scales(draw, lattice, rows, columns)
    grid = _rising(lattice)
    codes = draw.integers(0, len(grid["levels"]), (rows, columns)).astype(np.uint8)
    steps, lows = (
        _runs(scales, *names).repeat(lattice.sub, axis=1)
        for names in (("d", "scales"), ("dmin", "mins"))
    )
    errors = _weights(draw, rows, columns) - (steps * grid["levels"][codes] - lows)
    arguments = grid | scales | {
        "block": lattice.block, "half": lattice.half, "scale_range": lattice.scale_range,
        "min_range": lattice.min_range or (0, 0), "hessian": hessian,
        "sums": hessian.reshape(-1, lattice.sub, columns).sum(axis=1),
        "gradient": errors @ hessian, "scales_too": scales_too, "codes": codes,
    }  # fmt: skip
    kind = "codes and scales" if scales_too else "codes"
    return Problem(f"{name}, sweep of {kind}, {rows} x {columns}", SWEEP, arguments)


@cache
def _grid(name: str, signs: str) -> tuple[dict[str, Any], np.ndarray]:
    """The grid as the kernels take it, and its points."""
    points = CODEBOOKS[name].points
    halves = np.split(points, 2, axis=1)
    (first, one), (second, two) = (np.unique(h, axis=0, return_inverse=True) for h in halves)
    patterns = np.stack([one.ravel(), two.ravel()], axis=1).astype(np.uint8)
    grid = {"first": first, "second": second, "patterns": patterns, "signs": signs}
    return grid | {"apart": CODEBOOKS[name].apart}, points


def _norms(points: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    weighed = diagonal.reshape(-1, points.shape[1]) @ (points * points).T
    return np.ascontiguousarray(weighed, np.float32)


def _points() -> Iterator[Problem]:
    widths = cycle((64, 256))
    for (name, signs), rows in product(POINTS, ROWS):
        lattice = CODEBOOKS[name]
        draw = np.random.default_rng([rows, *name.encode(), *signs.encode()])
        for spread in SPREADS:
            yield _feedback_points(draw, name, signs, rows, next(widths), spread)
        next(widths)  # so that either spread meets either width
        for scales_too in (False, True):
            yield _sweep_points(draw, name, signs, lattice, rows, scales_too)
    draw = np.random.default_rng(3)
    yield _steep(_sweep_points(draw, "IQ3_S", "free", CODEBOOKS["IQ3_S"], 17, True))


def _odd(draw: np.random.Generator, lattice: CodebookLattice, shape: tuple[int, int]) -> np.ndarray:
    """Odd scales over the whole range, its ends among them."""
    low, high = lattice.scale_range
    return (2 * draw.integers(low // 2, high // 2 + 1, shape) + 1).astype(np.float32)


def _feedback_points(
    draw: np.random.Generator, name: str, signs: str, rows: int, columns: int, spread: int
) -> Problem:
    lattice = CODEBOOKS[name]
    grid, points = _grid(name, signs)
    _, factor, pivots = _inputs(columns)
    width = 8 if signs == "even" else lattice.group
    own = factor.reshape(columns // width, width, -1, width)
    own = own[np.arange(len(own)), :, np.arange(len(own))]
    metric = (own * pivots.reshape(-1, 1, width)) @ own.transpose(0, 2, 1)
    weights = _weights(draw, rows, columns)
    earlier = draw.standard_normal(weights.shape).astype(np.float32) * np.float32(0.01)
    arguments = grid | {
        "sub": lattice.sub, "spread": spread, "most": lattice.scale_range[1],
        "target": weights + earlier, "weights": weights, "factor": factor,
        "metric": np.ascontiguousarray(metric.reshape(columns, width), np.float32),
        "norms": _norms(points, metric.diagonal(axis1=1, axis2=2)),
        "d": _factors(draw, rows, 1, 15 * float(np.abs(points).max()))[:, 0],
        "scales": _odd(draw, lattice, (rows, columns // lattice.sub)),
        "codes": np.zeros((rows, columns // lattice.group), np.int32),
        "errors": np.zeros_like(weights),
    }  # fmt: skip
    label = f"{name}, {signs} signs, feedback, {rows} x {columns}, spread {spread}"
    return Problem(label, FEEDBACK_POINTS, arguments)


def _sweep_points(
    draw: np.random.Generator, name: str, signs: str, lattice: CodebookLattice, rows: int,
    scales_too: bool,
) -> Problem:  # fmt: skip
    columns, group = lattice.block, lattice.group
    hessian, (grid, points) = _inputs(columns)[0], _grid(name, signs)
    codes = draw.integers(0, len(points), (rows, columns // group))
    if lattice.apart:
        halves = draw.integers(0, 2, (rows, columns // lattice.sub)) * (len(points) // 2)
        codes = codes % (len(points) // 2) + halves.repeat(lattice.sub // group, axis=1)
    minus = draw.integers(0, 2, (rows, columns // 8, 8))
    if signs == "even":
        minus[:, :, 7] = minus[:, :, :7].sum(axis=2) % 2
    minus = minus.reshape(*codes.shape, group) * (signs != "none")
    levels = np.where(minus, -points[codes], points[codes]).reshape(rows, columns)
    d = _factors(draw, rows, 1, 15 * float(np.abs(points).max()))
    scales = _odd(draw, lattice, (rows, columns // lattice.sub))
    values = d * scales.repeat(lattice.sub, axis=1) * levels
    arguments = grid | {
        "sub": lattice.sub, "block": columns, "scale_range": lattice.scale_range,
        "hessian": hessian, "norms": _norms(points, hessian.diagonal()),
        "gradient": (_weights(draw, rows, columns) - values) @ hessian, "scales_too": scales_too,
        "codes": (codes | (minus << (SIGNS_SHIFT + np.arange(group))).sum(axis=2)).astype(np.int32),
        "d": d, "scales": scales,
    }  # fmt: skip
    kind = "codes and scales" if scales_too else "codes"
    return Problem(
        f"{name}, {signs} signs, sweep of {kind}, {rows} x {columns}", SWEEP_POINTS, arguments
    )
