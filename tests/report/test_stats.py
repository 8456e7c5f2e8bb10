"""The streamed statistics equal the textbook formulas on whole arrays."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.report.stats import (
    OUTLIER_RATIO,
    Moments,
    empty_stats,
    measure_rows,
    moments_of,
)


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    heavy = rng.standard_t(3, (300, 512))
    spiked = rng.standard_normal((64, 256))
    spiked[5, 17] = 90.0
    spiked[:, 200] *= 12
    return {
        "gaussian": rng.standard_normal((700, 512)),
        "heavy": heavy,
        "spiked": spiked,
        "far": 1e6 + rng.standard_normal((50, 40)),
        "one row": rng.standard_normal((1, 4096)),
        "one column": rng.standard_normal((513, 1)),
        "one weight": np.array([[2.5]]),
        "wide": rng.standard_normal((3, (1 << 18) + 5)),
        "tiny": rng.standard_normal((20, 64)) * 1e-40,
    }


ARRAYS = _arrays()


@pytest.fixture(params=ARRAYS, ids=str)
def array(request) -> np.ndarray:
    return ARRAYS[request.param]


def test_moments_equal_the_formulas(array):
    stats = measure_rows(array)
    n = array.size
    mean = math.fsum(array.flat) / n
    deviation = array - mean
    m2 = math.fsum((deviation**2).flat)
    m4 = math.fsum((deviation**4).flat)
    assert stats.moments.count == n
    assert stats.moments.low == array.min()
    assert stats.moments.high == array.max()
    assert stats.moments.mean == pytest.approx(mean, rel=1e-12, abs=1e-12 * np.abs(array).max())
    assert stats.moments.std == pytest.approx(math.sqrt(m2 / n), rel=1e-10)
    if n > 1 and m2 * m2 > 0:
        assert stats.moments.kurtosis == pytest.approx(n * m4 / m2**2, rel=1e-9)
    assert stats.nonfinite == 0


def test_outliers_are_counted_where_they_are(array):
    stats = measure_rows(array)
    rms = np.sqrt((array**2).mean(axis=1, keepdims=True))
    expected = (np.abs(array) > OUTLIER_RATIO * rms).sum(axis=0)
    assert stats.outliers.tolist() == expected.tolist()
    assert stats.outlier_share == expected.sum() / array.size
    assert stats.abs_max.tolist() == np.abs(array).max(axis=0).tolist()


def test_the_spike_is_found():
    stats = measure_rows(ARRAYS["spiked"])
    assert stats.outliers[17] == 1
    first = stats.channels(2)[0]
    assert (first.index, first.abs_max, first.outliers) == (17, 90.0, 1)
    assert first.ratio == 90.0 / np.median(np.abs(ARRAYS["spiked"]).max(axis=0))
    assert stats.channels(2)[1].index == 200


@pytest.mark.parametrize("cut", [1, 7, 299])
def test_merging_parts_equals_the_whole(cut):
    array = ARRAYS["heavy"]
    whole = measure_rows(array)
    merged = empty_stats(array.shape[1])
    for start in range(0, len(array), cut):
        merged = merged.merge(measure_rows(array[start : start + cut]))
    assert merged.moments.count == whole.moments.count
    for field in ("mean", "m2", "m3", "m4"):
        assert getattr(merged.moments, field) == pytest.approx(
            getattr(whole.moments, field), rel=1e-9
        )
    assert merged.outliers.tolist() == whole.outliers.tolist()
    assert merged.abs_max.tolist() == whole.abs_max.tolist()


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40),
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40),
)
def test_merged_moments_equal_those_of_all_values(left, right):
    merged = moments_of(np.array(left)).merge(moments_of(np.array(right)))
    whole = moments_of(np.array(left + right))
    scale = max(map(abs, left + right))
    n = len(left + right)
    assert merged.count == n
    assert (merged.low, merged.high) == (whole.low, whole.high)
    for power, field in enumerate(("m2", "m3", "m4"), 2):
        assert getattr(merged, field) == pytest.approx(
            # Below 1e-300 float64 itself has few digits left.
            getattr(whole, field),
            rel=1e-8,
            abs=max(1e-300, 1e-10 * n * scale**power),
        )


@pytest.mark.parametrize(
    "dtype",
    [np.float16, np.float32, np.float64, ml_dtypes.bfloat16],
    ids=lambda d: np.dtype(d).name,
)
def test_every_float_dtype_is_taken_exactly(dtype):
    array = np.random.default_rng(2).standard_normal((33, 65)).astype(dtype)
    stats = measure_rows(array)
    exact = measure_rows(array.astype(np.float64))
    assert stats.moments == exact.moments
    assert stats.abs_max.tolist() == exact.abs_max.tolist()


def test_a_view_that_is_not_contiguous_is_read_rightly():
    array = np.random.default_rng(3).standard_normal((40, 60)).astype(ml_dtypes.bfloat16)
    assert measure_rows(array[::2]).moments == measure_rows(array[::2].copy()).moments


def test_values_that_are_not_numbers_are_counted_and_left_out():
    array = np.random.default_rng(4).standard_normal((10, 100))
    clean = array.copy()
    array[3, 5], array[4, 6], array[4, 7] = np.nan, np.inf, -np.inf
    stats = measure_rows(array)
    kept = clean[np.isfinite(array)]
    assert stats.nonfinite == 3
    assert stats.moments.count == kept.size
    assert stats.moments.std == pytest.approx(kept.std(), rel=1e-12)
    assert np.isfinite(stats.abs_max).all()


def test_constant_weights_have_no_kurtosis_and_no_channels_that_stand_out():
    stats = measure_rows(np.zeros((4, 50)))
    assert stats.moments.std == 0
    assert math.isnan(stats.moments.kurtosis)
    assert stats.channels(5) == []
    assert stats.outlier_count == 0


def test_huge_values_overflow_without_a_mishap():
    stats = measure_rows(np.full((4, 50), 1e300) * np.arange(1, 51))
    assert stats.moments.high == 5e301
    assert math.isinf(stats.moments.std)
    assert math.isnan(stats.moments.kurtosis)


def test_no_values():
    assert math.isnan(Moments().std)
    assert measure_rows(np.zeros((0, 5))).moments.count == 0
    assert measure_rows(np.zeros((3, 0))).outlier_share == 0
