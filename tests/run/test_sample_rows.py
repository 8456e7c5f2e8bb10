"""Rows that stand for a matrix: all of a small one, those that weigh most of a large one."""

from __future__ import annotations

import numpy as np
import pytest

from quantcli.run.sample_rows import sample_rows


@pytest.mark.parametrize("rows", [1, 100, 8192, 20000])
def test_a_small_matrix_is_taken_whole(rows: int) -> None:
    runs = sample_rows(np.ones(rows), 64)
    assert [row for start, stop in runs for row in range(start, stop)] == list(range(rows))


def test_of_a_large_one_the_rows_that_weigh_most_are_taken() -> None:
    weights = np.random.default_rng(0).pareto(1.5, 50001)
    runs = sample_rows(weights, 4096)
    taken = np.concatenate([np.arange(*run) for run in runs])
    assert len(set(taken)) == len(taken)
    assert taken.max() < len(weights)
    assert 0 < len(taken) * 4096 <= 1 << 22
    share = len(taken) / len(weights)
    assert weights[taken].sum() > 5 * share * weights.sum()


def test_something_is_taken_of_every_matrix_of_a_stack() -> None:
    assert len(sample_rows(np.ones(768), 2048 * 128)) == 1
