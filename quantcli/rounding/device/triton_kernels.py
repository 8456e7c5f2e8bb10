"""Feedback and sweeps of scalar codebooks, each loop over columns as one Triton kernel.

A program has two rows in the registers of one warp and goes through the columns in order, with the
operations of ``native/kernels/lattice.c``: divisions are rounded to nearest and nothing is fused,
so that the codes are the native kernels'. Tests run them in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_ROWS = 2
_WARPS = 1


@triton.jit
def _nearest(
    ratio, levels, middles, low, top,
    count: tl.constexpr, uniform: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    """Places of the nearest levels, int32, and these."""
    if uniform:
        place = ratio - low
        place = tl.where(place < top, place, top)
        place = tl.where(place > 0, place, 0.0)
        # To the nearest, ties to even: what is left of it beside 1.5 * 2^23.
        place = (place + 12582912.0) - 12582912.0
        code = place.to(tl.int32)
        level = place + low
    else:
        code = tl.zeros_like(ratio).to(tl.int32)
        for bit in tl.static_range(bits):
            probe = code + (1 << (bits - 1 - bit))
            there = probe < count
            middle = tl.load(middles + probe - 1, mask=there, other=float("inf"))
            code = tl.where(there & (ratio > middle), probe, code)
        level = tl.load(levels + code)
    return code, level


@triton.jit
def _feedback(
    target, weights, factor, steps, lows, levels, middles, codes, errors,
    rows, columns, run, low, top,
    count: tl.constexpr, uniform: tl.constexpr, bits: tl.constexpr, height: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * height + tl.arange(0, height)
    column = tl.arange(0, width)
    is_row = row < rows
    mask = is_row[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    x = tl.load(target + place, mask=mask, other=0.0)
    w = tl.load(weights + place, mask=mask, other=0.0)
    found = tl.zeros([height, width], tl.int32)
    runs = columns // run
    for j in range(columns):
        here = (column == j)[None, :]
        own = tl.sum(tl.where(here, x, 0.0), 1)
        weight = tl.sum(tl.where(here, w, 0.0), 1)
        step = tl.load(steps + row * runs + j // run, mask=is_row, other=1.0)
        least = tl.load(lows + row * runs + j // run, mask=is_row, other=0.0)
        ratio = tl.div_rn(own + least, step)
        code, level = _nearest(ratio, levels, middles, low, top, count, uniform, bits)
        error = weight - (step * level - least)
        found = tl.where(here, code[:, None], found)
        w = tl.where(here, error[:, None], w)
        later = (column > j) & (column < columns)
        share = tl.load(factor + j * columns + column, mask=later, other=0.0)
        x += error[:, None] * share[None, :]
    tl.store(codes + place, found.to(tl.uint8), mask=mask)
    tl.store(errors + place, w, mask=mask)


@triton.jit
def _sweep(
    hessian, gradient, steps, lows, table, middles, codes, levels, values,
    rows, columns, run, low, top,
    count: tl.constexpr, uniform: tl.constexpr, bits: tl.constexpr, height: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * height + tl.arange(0, height)
    column = tl.arange(0, width)
    is_row = row < rows
    mask = is_row[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    pull = tl.load(gradient + place, mask=mask, other=0.0)
    found = tl.load(codes + place, mask=mask, other=0).to(tl.int32)
    held = tl.load(table + found)
    runs = columns // run
    at = row[:, None] * runs + column[None, :] // run
    value = tl.load(steps + at, mask=mask, other=1.0) * held
    value -= tl.load(lows + at, mask=mask, other=0.0)
    for j in range(columns):
        here = (column == j)[None, :]
        now = tl.sum(tl.where(here, value, 0.0), 1)
        slope = tl.sum(tl.where(here, pull, 0.0), 1)
        old = tl.sum(tl.where(here, found, 0), 1)
        before = tl.sum(tl.where(here, held, 0.0), 1)
        step = tl.load(steps + row * runs + j // run, mask=is_row, other=1.0)
        least = tl.load(lows + row * runs + j // run, mask=is_row, other=0.0)
        share = tl.load(hessian + j * columns + column, mask=column < columns, other=0.0)
        own = tl.load(hessian + j * columns + j)
        best = now + tl.div_rn(slope, tl.zeros_like(slope) + own)
        ratio = tl.div_rn(best + least, step)
        code, level = _nearest(ratio, table, middles, low, top, count, uniform, bits)
        code = tl.where(step == 0, old, code)
        level = tl.where(step == 0, before, level)
        new = step * level - least
        pull -= share[None, :] * (new - now)[:, None]
        found = tl.where(here, code[:, None], found)
        held = tl.where(here, level[:, None], held)
        value = tl.where(here, new[:, None], value)
    tl.store(codes + place, found.to(tl.uint8), mask=mask)
    tl.store(gradient + place, pull, mask=mask)
    tl.store(levels + place, held, mask=mask)
    tl.store(values + place, value, mask=mask)


def feedback(
    levels: Any, run: int, target: torch.Tensor, weights: torch.Tensor, factor: torch.Tensor,
    steps: torch.Tensor, lows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`TensorScalarKernels.feedback` with ``levels``, a `TensorLevels`."""
    given = [part.contiguous() for part in (target, weights, factor, steps, lows)]
    rows, columns = target.shape
    codes = torch.empty_like(given[0], dtype=torch.uint8)
    errors = torch.empty_like(given[0])
    _feedback[_grid(rows)](
        *given, levels.values, levels.middles, codes, errors, rows, columns, run, levels.low,
        levels.top, **_options(levels, columns),
    )  # fmt: skip
    return codes, errors


def sweep_codes(
    levels: Any, run: int, hessian: torch.Tensor, gradient: torch.Tensor, codes: torch.Tensor,
    steps: torch.Tensor, lows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Codes, gradient, levels and values (n, columns) after `TensorScalarKernels.sweep_codes`."""
    rows, columns = gradient.shape
    hessian, steps, lows = (part.contiguous() for part in (hessian, steps, lows))
    found, pull = (part.clone(memory_format=torch.contiguous_format) for part in (codes, gradient))
    held, values = torch.empty_like(pull), torch.empty_like(pull)
    _sweep[_grid(rows)](
        hessian, pull, steps, lows, levels.values, levels.middles, found, held, values, rows,
        columns, run, levels.low, levels.top, **_options(levels, columns),
    )  # fmt: skip
    return found, pull, held, values


def _grid(rows: int) -> tuple[int]:
    return (triton.cdiv(rows, _ROWS),)


def _options(levels: Any, columns: int) -> dict[str, Any]:
    count = len(levels.values)
    return {
        "count": count, "uniform": levels.uniform, "bits": max(1, (count - 1).bit_length()),
        "height": _ROWS, "width": triton.next_power_of_2(columns), "num_warps": _WARPS,
        "enable_fp_fusion": False,
    }  # fmt: skip
