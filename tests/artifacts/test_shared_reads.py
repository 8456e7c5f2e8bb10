"""Rows that are read once for all who ask for them in about the same order."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from quantcli.artifacts import slabs
from quantcli.artifacts.shared_reads import SharedReads, shared_bytes
from quantcli.types import TensorInfo


class Store:
    """Two tensors in memory: a matrix of 1,000 rows, and a stack of two matrices."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.values = {"m": rng.random((1000, 8), np.float32), "s": rng.random((2, 60, 40), "f4")}
        self.tensors = {
            name: TensorInfo(name, each.shape, "F32", each.nbytes, Path("x"))
            for name, each in self.values.items()
        }
        self.read: Counter[tuple[str, str, int]] = Counter()
        self.broken = False

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if self.broken:
            raise OSError("gone")
        self.read.update((name, "row", row) for row in range(start, stop))
        return self.values[name].reshape(-1, self.values[name].shape[-1])[start:stop].copy()

    def read_columns(self, name: str, start: int, stop: int) -> np.ndarray:
        self.read.update((name, "column", column) for column in range(start, stop))
        width = self.values[name].shape[-1]
        matrix = self.values[name].reshape(-1, *self.values[name].shape[-2:])[start // width]
        return matrix[:, start % width : (stop - 1) % width + 1].T.copy()

    def close(self) -> None:
        raise AssertionError("its files are another's")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(slabs, "SLAB_BYTES", 2048)
    return Store()


@pytest.mark.parametrize("readers", [1, 4])
def test_each_row_is_read_once(store: Store, readers: int) -> None:
    shared = SharedReads.of(store, readers)
    spans = sorted((a, min(a + n, 1000)) for n in (7, 64, 100) for a in range(0, 1000, n))
    with ThreadPoolExecutor(readers) as pool:
        found = list(pool.map(lambda span: shared.read_rows("m", *span), spans))
    for span, rows in zip(spans, found, strict=True):
        assert np.array_equal(rows, store.values["m"][slice(*span)])
    assert store.read == Counter(("m", "row", row) for row in range(1000))
    with pytest.raises(ValueError, match="read-only"):
        found[0][0] = 0
    shared.close()


def test_columns_of_a_stack_stay_in_their_matrix(store: Store) -> None:
    shared = SharedReads.of(store, 1)
    for first, last in ((0, 9), (5, 40), (40, 47), (44, 80)):
        matrix = store.values["s"][first // 40]
        expected = matrix[:, first % 40 : (last - 1) % 40 + 1].T
        assert np.array_equal(shared.read_columns("s", first, last), expected)
    assert store.read == Counter(("s", "column", column) for column in range(80))


def test_no_more_is_held_than_is_said(store: Store) -> None:
    shared = SharedReads.of(store, 2)
    # Slabs of 128 rows at least.
    assert shared_bytes(store, 2) == 6 * max(120 * 160, 128 * 32)
    for start in range(0, 1000, 100):
        shared.read_rows("m", start, start + 100)
    first = store.read[("m", "row", 0)]
    shared.read_rows("m", 0, 1)
    assert (first, store.read[("m", "row", 0)]) == (1, 2)


def test_a_read_that_failed_is_not_kept(store: Store) -> None:
    shared = SharedReads.of(store, 1)
    store.broken = True
    with pytest.raises(OSError, match="gone"):
        shared.read_rows("m", 0, 5)
    store.broken = False
    assert np.array_equal(shared.read_rows("m", 0, 5), store.values["m"][:5])
    assert shared.read_rows("m", 5, 5).shape == (0, 8)
