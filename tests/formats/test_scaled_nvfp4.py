"""NVFP4 under a scale of the tensor: what it decodes to, and how much closer that is."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize

from quantcli.formats import get_format, native, scaled_nvfp4


def draw(deviation: float = 0.02) -> np.ndarray:
    return np.random.default_rng(1).normal(0, deviation, (64, 1024)).astype(np.float32)


@pytest.mark.parametrize("deviation", [1e-6, 0.02, 1.0, 1e5])
def test_the_library_decodes_the_same_blocks(deviation: float) -> None:
    weights = draw(deviation)
    scale = scaled_nvfp4.tensor_scale(float(np.abs(weights).max()))
    packed = scaled_nvfp4.encode(weights, scale, None)
    values = dequantize(packed, GGMLQuantizationType.NVFP4) * np.float32(scale)
    assert np.array_equal(values, scaled_nvfp4.decode(packed, scale))
    assert np.abs(values - weights).max() < 0.2 * np.abs(weights).max()
    assert np.square(values - weights).sum() < 0.01 * np.square(weights).sum()


@pytest.mark.parametrize("deviation", [0.02, 0.01])
def test_it_leaves_less_than_two_thirds_of_llama_cpps_error(deviation: float) -> None:
    weights, plain = draw(deviation), get_format("NVFP4")
    scale = scaled_nvfp4.tensor_scale(float(np.abs(weights).max()))
    found = scaled_nvfp4.decode(scaled_nvfp4.encode(weights, scale, None), scale)
    theirs = native.decode(plain, native.encode(plain, weights))
    assert np.square(found - weights).sum() < 0.65 * np.square(theirs - weights).sum()


def test_zeros_stay_zeros() -> None:
    weights = draw()
    weights[3] = 0
    weights[:, 64:80] = 0
    scale = scaled_nvfp4.tensor_scale(float(np.abs(weights).max()))
    found = scaled_nvfp4.decode(scaled_nvfp4.encode(weights, scale, None), scale)
    assert not found[3].any()
    assert not found[:, 64:80].any()
    assert scaled_nvfp4.tensor_scale(0.0) == 1.0


def test_importance_weighs_the_error() -> None:
    weights = draw()
    importance = np.random.default_rng(2).lognormal(0, 2, 1024).astype(np.float32)
    scale = scaled_nvfp4.tensor_scale(float(np.abs(weights).max()))
    plain, weighed = (
        scaled_nvfp4.decode(scaled_nvfp4.encode(weights, scale, given), scale)
        for given in (None, importance)
    )
    errors = [float((importance * (found - weights) ** 2).sum()) for found in (plain, weighed)]
    assert errors[1] < 0.95 * errors[0]


def test_what_is_no_number_is_refused() -> None:
    weights = draw()
    weights[7, 9] = np.inf
    with pytest.raises(native.UnencodableError) as caught:
        scaled_nvfp4.encode(weights, 1.0, None)
    assert (caught.value.row, caught.value.column) == (7, 9)
