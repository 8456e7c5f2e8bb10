"""MXFP4 and NVFP4 where rounding is delicate: peaks next to powers of two, ties, saturation."""

from __future__ import annotations

import numpy as np
import pytest
from support import ggml

from quantcli import _native
from quantcli.formats import BlockFormat, get_format


@pytest.fixture(params=["MXFP4", "NVFP4"])
def fmt(request: pytest.FixtureRequest) -> BlockFormat:
    return get_format(request.param)


def same_bytes(fmt: BlockFormat, blocks: np.ndarray) -> None:
    x = np.ascontiguousarray(blocks, np.float32)
    want = ggml.quantize(fmt.type_id, x, None)
    got = np.zeros_like(want)
    _native.encode(fmt.type_id, 0, x.reshape(-1).view(np.uint8), *x.shape, got.reshape(-1), None)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(fmt.quantize(x, None), want)


def around(values: np.ndarray, ulps: range) -> np.ndarray:
    """Each positive value and its neighbours, as many ulps away."""
    bits = np.float32(values).reshape(-1, 1).view(np.int32) + np.arange(ulps.start, ulps.stop)
    return bits.clip(0, 0x7F7FFFFF).astype(np.int32).view(np.float32).reshape(-1)


def with_peaks(fmt: BlockFormat, peaks: np.ndarray) -> np.ndarray:
    """A block for each peak, its other weights smaller."""
    rng = np.random.default_rng(5)
    spread = rng.uniform(-1, 1, (len(peaks), fmt.block)).astype(np.float32)
    blocks = spread * peaks[:, None]
    blocks[np.arange(len(peaks)), rng.integers(0, fmt.block, len(peaks))] = peaks
    return blocks


def test_peaks_next_to_every_power_of_two(fmt: BlockFormat, isa: str) -> None:
    """log2f rounds, so within 88 ulps below a power of two it can give the power itself."""
    powers = np.ldexp(np.float32(1), np.arange(-149, 128))
    same_bytes(fmt, with_peaks(fmt, around(powers, range(-100, 3))))


def test_peaks_at_the_end_of_the_range(fmt: BlockFormat, isa: str) -> None:
    same_bytes(fmt, with_peaks(fmt, around(np.finfo(np.float32).max, range(-100, 1))))


def test_peaks_next_to_every_scale_of_nvfp4(isa: str) -> None:
    codes = np.arange(127, dtype=np.uint8)
    packed = np.zeros((127, 36), np.uint8)
    packed[:, 0], packed[:, 4] = codes, 7
    largest = ggml.dequantize(40, packed)[:, 0]
    middles = (largest[1:] + largest[:-1]) / 2
    steps = np.concatenate([largest[1:], middles, largest[1:] / 6 * 4.4])
    same_bytes(get_format("NVFP4"), with_peaks(get_format("NVFP4"), around(steps, range(-9, 10))))


def test_ties_between_values_take_the_first(fmt: BlockFormat, isa: str) -> None:
    """Midpoints of every scale, a little below and above, of either sign."""
    middles = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    around_middles = np.concatenate([around(middles, range(-2, 3)), np.float32([0, 0, 0, 0])])
    signed = np.concatenate([around_middles, -around_middles])[: fmt.block - 16]
    each_group = np.tile(np.resize(signed, fmt.block), (200, 1))
    each_group[:, ::8] = 6
    same_bytes(fmt, each_group * np.ldexp(np.float32(1), np.arange(-100, 100))[:, None])
    rng = np.random.default_rng(6)
    same_bytes(fmt, each_group * rng.integers(1, 16, (200, 1)).astype(np.float32))


def test_saturated_groups(isa: str) -> None:
    """Beyond its largest scale the reference clips, and far beyond every error is equal."""
    fmt = get_format("NVFP4")
    peaks = np.geomspace(1000, 3e38, 400).astype(np.float32)
    blocks = with_peaks(fmt, peaks)
    blocks[:, 20:40] /= peaks[:, None]
    same_bytes(fmt, blocks)
