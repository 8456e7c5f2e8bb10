"""Frozen bytes of llama.cpp, for machines without it; scripts/make-golden writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import rows

from quantcli import _native
from quantcli.formats import BlockFormat

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def frozen() -> tuple[list[str], np.ndarray, np.ndarray]:
    with np.load(GOLDEN / "rows.npz") as file:
        kinds = [kind for kind in file.files if kind != "importance"]
        return kinds, np.stack([file[kind] for kind in kinds]), file["importance"]


def golden(fmt: BlockFormat) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{fmt.name}.npz") as file:
        packed = dict(file)
    assert packed.keys() == ({"weighted"} if fmt.needs_importance else {"plain", "weighted"})
    return packed


def test_kernels_give_the_frozen_bytes(
    fmt: BlockFormat, isa: str, frozen: tuple[list[str], np.ndarray, np.ndarray]
) -> None:
    kinds, x, importance = frozen
    x = rows.survivable(fmt, x)
    for weighing, want in golden(fmt).items():
        got = np.zeros_like(want)
        weights = importance if weighing == "weighted" else None
        flat = x.reshape(-1).view(np.uint8)
        assert _native.encode(fmt.type_id, 0, flat, *x.shape, got.reshape(-1), weights) == -1
        for kind, ours, theirs in zip(kinds, got, want, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{kind}, {weighing}")


def test_references_give_the_frozen_bytes(
    fmt: BlockFormat, frozen: tuple[list[str], np.ndarray, np.ndarray]
) -> None:
    kinds, x, importance = frozen
    x = rows.survivable(fmt, x)
    for weighing, want in golden(fmt).items():
        got = fmt.quantize(x, importance if weighing == "weighted" else None)
        for kind, ours, theirs in zip(kinds, got, want, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{kind}, {weighing}")
