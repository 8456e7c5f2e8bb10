"""The kernels of small floats: ml_dtypes' rounding on every 16-bit float, and any float32."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from support import rows

from quantcli.formats import native
from quantcli.formats.native import UnencodableError

DTYPES: dict[str, Any] = {"E4M3": ml_dtypes.float8_e4m3fn, "E2M1": ml_dtypes.float4_e2m1fn}
LARGEST = {"E4M3": np.float32(448), "E2M1": np.float32(6)}
STORED: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
}  # fmt: skip
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def by_ml_dtypes(values: NDArray[Any], scale: NDArray[Any] | float, kind: str) -> NDArray[Any]:
    """Divided in float32, held within the largest code, and rounded by ml_dtypes."""
    with np.errstate(over="ignore"):
        scaled = values.astype(np.float32) / np.float32(scale)
    held = np.clip(scaled, -LARGEST[kind], LARGEST[kind])
    return held.astype(DTYPES[kind]).view(np.uint8)


@pytest.mark.parametrize("scale", [1.0, 0.0078125, 3.1e-5, 0.0123, 1e-30, 7e8])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("stored", ["F16", "BF16"])
def test_every_16_bit_float_is_rounded_as_ml_dtypes_does(
    isa: str, stored: str, kind: str, scale: float
) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(STORED[stored])
    finite = every[np.isfinite(every.astype(np.float32))][None]
    scales = np.full((1, 1), scale, np.float32)
    found = native.small_floats(finite, scales, finite.shape[1], kind)
    assert np.array_equal(found, by_ml_dtypes(finite, scale, kind))


@pytest.mark.parametrize("kind", DTYPES)
@settings(max_examples=200, deadline=None)
@given(
    values=arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 70)), elements=FINITE),
    scale=st.floats(2**-100, 2**100, width=32),
)
def test_any_float_is_rounded_as_ml_dtypes_does(
    kind: str, values: NDArray[np.float32], scale: float
) -> None:
    scales = np.full((len(values), 1), scale, np.float32)
    found = native.small_floats(values, scales, values.shape[1], kind)
    assert np.array_equal(found, by_ml_dtypes(values, scale, kind))


@pytest.mark.parametrize("kind", DTYPES)
def test_middles_and_their_neighbours(isa: str, kind: str) -> None:
    """Where one unit in the last place decides."""
    codes = np.arange(128 if kind == "E4M3" else 8, dtype=np.uint8)
    levels = codes.view(DTYPES[kind]).astype(np.float32)
    levels = levels[np.isfinite(levels)]
    middles = (levels[1:] + levels[:-1]) / 2
    near = [np.nextafter(middles, np.float32(side)) for side in (-1e9, 1e9)]
    values = np.concatenate([levels, middles, *near])
    values = np.concatenate([values, -values])[None]
    found = native.small_floats(values, np.ones((1, 1), np.float32), values.shape[1], kind)
    assert np.array_equal(found, by_ml_dtypes(values, 1, kind))
    down = native.small_floats(
        values, np.ones((1, 1), np.float32), values.shape[1], "E2M1", even=False
    )
    fours = np.arange(8, dtype=np.uint8).view(DTYPES["E2M1"]).astype(np.float32)
    # The first of equal distances is the smaller magnitude, and zero has no sign.
    nearest = np.abs(np.abs(values)[..., None] - fours).argmin(-1)
    assert np.array_equal(down, np.where((values < 0) & (nearest > 0), nearest | 8, nearest))


@pytest.mark.parametrize("width", [1, 7, 16, 32, 128, 5000, 9001])
@pytest.mark.parametrize("shape", [(3, 41), (130, 300), (2, 9001), (0, 64), (4, 0)])
@pytest.mark.parametrize("stored", STORED)
def test_each_run_of_columns_has_its_scale(
    isa: str, stored: str, shape: tuple[int, int], width: int
) -> None:
    generator = np.random.default_rng(5)
    values = generator.standard_normal(shape).astype(np.float32).astype(STORED[stored])
    found = native.largest(values, width)
    runs = -(-shape[1] // width)
    assert found.shape == (shape[0], runs)
    widened = np.abs(values.astype(np.float32))
    for run in range(runs):
        own = widened[:, run * width : (run + 1) * width]
        assert np.array_equal(found[:, run], own.max(axis=1, initial=0))
    scales = (generator.random(found.shape) ** 2).astype(np.float32)
    scales[generator.random(found.shape) < 0.1] = 0
    spread = np.repeat(np.where(scales == 0, np.float32(1), scales), width, axis=1)[:, : shape[1]]
    codes = native.small_floats(values, scales, width, "E4M3")
    assert np.array_equal(codes, by_ml_dtypes(values, spread, "E4M3").reshape(shape))


@pytest.mark.parametrize("kind", rows.KINDS)
def test_every_kind_of_row(isa: str, kind: str) -> None:
    values = rows.make(kind, 5, 391)
    largest = native.largest(values, 391)
    assert np.array_equal(largest[:, 0], np.abs(values).max(axis=1))
    scales = np.maximum(largest / np.float32(448), np.float32(2**-126))
    found = native.small_floats(values, scales, 391, "E4M3")
    assert np.array_equal(found, by_ml_dtypes(values, scales, "E4M3"))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [(0, 0), (2, 40), (1, 4999), (3, 5002)])
@pytest.mark.parametrize("stored", STORED)
def test_the_first_weight_that_is_no_number_is_named(
    isa: str, stored: str, place: tuple[int, int], value: float
) -> None:
    values = np.ones((4, 5003), STORED[stored])
    values[place] = values[3, 5002] = value
    with pytest.raises(UnencodableError, match="not a finite number") as refused:
        native.largest(values, 128)
    assert (refused.value.row, refused.value.column) == place


def test_scales_must_fit() -> None:
    with pytest.raises(ValueError, match=r"scales of shape \(2, 2\) do not fit 2 x 300 weights"):
        native.small_floats(np.ones((2, 300), np.float32), np.ones((2, 2), np.float32), 128, "E4M3")
    with pytest.raises(TypeError, match="int32"):
        native.largest(np.ones((2, 300), np.int32), 128)
