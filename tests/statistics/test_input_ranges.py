"""Static int8 ranges: the histogram is counted as it is defined, and the error is the least."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from quantcli.layouts.base import Extremes
from quantcli.statistics.input_histogram import BINS, bin_values, count_values
from quantcli.statistics.input_ranges import narrow

FLOATS = st.floats(-1e5, 1e5, width=32)


def tokens(count: int = 2000, columns: int = 64) -> NDArray[np.float32]:
    """Most are alike, and a few are of enormous values in one column."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal((count, columns)).astype(np.float32)
    values[:5, 3] = 300 * generator.random(5).astype(np.float32) + 100
    return values


def relative_error(
    values: NDArray[np.float32], low: float, high: float, *, symmetric: bool
) -> float:
    """As compressed-tensors quantizes, the mean over tokens of the error over a token's size."""
    if symmetric:
        scale, zero = max(-low, high) / 127.5, 0.0
    else:
        scale = (high - low) / 255
        zero = float(np.clip(np.rint(-128 - low / scale), -128, 127))
    wide = values.astype(np.float64)
    codes = np.clip(np.rint(wide / scale) + zero, -128, 127)
    missed = ((codes - zero) * scale - wide) ** 2
    return float((missed.sum(1) / (wide**2).sum(1)).mean())


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 12)), elements=FLOATS))
def test_each_value_counts_in_its_bin_by_its_tokens_size(values: NDArray[np.float32]) -> None:
    wanted = np.zeros(BINS)
    for row in values.astype(np.float64):
        size = float((row**2).sum())
        if size == 0 or not np.isfinite(1 / size):
            continue
        for value in row:
            magnitude = abs(value)
            octave = int(np.floor(np.log2(magnitude))) if magnitude else -1000
            step = int((magnitude / 2.0**octave - 1) * 16) if octave > -21 else 0
            place = int(np.clip((octave + 20) * 16 + step, 0, BINS // 2 - 1))
            wanted[place + BINS // 2 * bool(np.signbit(value))] += 1 / size
    np.testing.assert_allclose(count_values(values), wanted, rtol=1e-9)


def test_a_bins_values_lie_in_it() -> None:
    values = bin_values()
    for column in range(values.shape[1]):
        own = values[:, column].astype(np.float32)[:, None]
        places = np.array([count_values(value[None]).argmax() for value in own])
        # Zero has no size, and so counts nowhere.
        held = own[:, 0] != 0
        assert np.array_equal(places[held], np.arange(BINS)[held])


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_other_range_is_much_better(symmetric: bool) -> None:
    """Of all multiples of the extremes, by the error itself rather than by the histogram's."""
    values = tokens()
    seen = Extremes(float(values.min()), float(values.max()))
    found = narrow(count_values(values), seen, symmetric=symmetric)
    error = relative_error(values, found.low, found.high, symmetric=symmetric)
    factors = np.geomspace(1 / 100, 1, 60)
    if symmetric:
        spans = [(-seen.largest * f, seen.largest * f) for f in factors]
    else:
        spans = [(seen.low * f, seen.high * g) for f in factors[::3] for g in factors[::3]]
    least = min(relative_error(values, low, high, symmetric=symmetric) for low, high in spans)
    whole = relative_error(values, seen.low, seen.high, symmetric=symmetric)
    assert error <= 1.03 * least
    assert error < 0.1 * whole


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_spread_evenly_keeps_its_extremes(symmetric: bool) -> None:
    values = np.random.default_rng(1).uniform(-1, 3, (500, 32)).astype(np.float32)
    seen = Extremes(float(values.min()), float(values.max()))
    found = narrow(count_values(values), seen, symmetric=symmetric)
    assert found.high == seen.high
    assert found.low == (-seen.high if symmetric else seen.low)


def test_values_of_one_sign_keep_their_zero() -> None:
    values = np.abs(tokens())
    seen = Extremes(0.0, float(values.max()))
    found = narrow(count_values(values), seen, symmetric=False)
    assert found.low == 0
    assert 3 < found.high < 20
