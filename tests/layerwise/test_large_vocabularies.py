"""What a head of very many tokens takes: neither its weights nor their check are copied whole."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from quantcli.formats import native

pytest.importorskip("torch")

import torch

from quantcli.layerwise import steady as module
from quantcli.layerwise.steady import steady


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1, 2])
def test_products_of_a_long_batch_are_torch_s_own(dtype: str, count: int) -> None:
    """As a head's gradient is made: few positions, and a sum over the vocabulary."""
    draw = torch.Generator().manual_seed(0)
    tokens = module._COPIED // module._TILE
    one, other = (
        torch.randn(shape, generator=draw).to(getattr(torch, dtype))
        for shape in ((count, 3, tokens), (count, tokens, 520))
    )
    with steady():
        found = torch.bmm(one, other)
    for number in range(count):
        for columns in (slice(0, 512), slice(512, 520)):
            wanted = one[number] @ other[number, :, columns]
            assert torch.equal(found[number, :, columns], wanted)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_the_first_number_that_is_none_is_found_anywhere(dtype: str, bad: float) -> None:
    rows = np.ones((3, native._LOOKED_AT), dtype)
    assert native.first_not_finite(rows) == -1
    for place in (rows.size - 1, native._LOOKED_AT, native._LOOKED_AT - 1, 0):
        rows.reshape(-1)[place] = bad
        assert native.first_not_finite(rows) == place


def test_looking_for_it_takes_little_memory() -> None:
    rows = np.ones((16, native._LOOKED_AT), np.float32)
    tracemalloc.start()
    native.first_not_finite(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < rows.nbytes // 4
