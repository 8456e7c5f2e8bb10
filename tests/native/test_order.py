"""Which kernel is faster than which; how fast in absolute terms is the business of scripts/bench.

Two sides run in turns on one thread and their median processor times are compared, so that a busy
machine slows both alike. The limits lie far below what is measured (about half of it or less):
they notice a kernel that has lost its vectors, not one that has become a little slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from support import ggml, rows

from quantcli import _native
from quantcli.formats import FORMATS, get_format, native

Side = Callable[[], object]

ROUNDED = {"Q8_0", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"}
"""Formats without a search; every instruction set encodes them at nearly the speed of memory."""

BLOCKS = [name for name in FORMATS if get_format(name).block > 1]
SEARCHED = [name for name in BLOCKS if name not in ROUNDED]
ISAS = _native.available()


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    before = _native.isa()
    yield
    _native.select(before)


def lead(benchmark: BenchmarkFixture, slower: Side, faster: Side, rounds: int = 7) -> float:
    """How many times as long ``slower`` takes."""
    taken: dict[Side, list[float]] = {slower: [], faster: []}

    def both() -> None:
        for side, times in taken.items():
            start = time.thread_time()
            side()
            times.append(time.thread_time() - start)

    benchmark.pedantic(both, rounds=rounds, warmup_rounds=1)
    ratio = median(taken[slower]) / median(taken[faster])
    benchmark.extra_info["lead"] = ratio
    return ratio


def encoder(name: str, x: np.ndarray, isa: str = ISAS[0]) -> Side:
    fmt, weights = get_format(name), rows.importance("spread", x.shape[1])

    def encode() -> None:
        _native.select(isa)
        native.encode(fmt, x, weights)

    return encode


def reference(name: str, x: np.ndarray) -> Side:
    fmt, weights = get_format(name), rows.importance("spread", x.shape[1])
    return lambda: fmt.quantize(x, weights)


def llama_cpp(name: str, x: np.ndarray) -> Side:
    fmt, weights = get_format(name), rows.importance("spread", x.shape[1])
    return lambda: ggml.quantize(fmt.type_id, x, weights)


@pytest.mark.parametrize(("better", "worse"), list(pairwise(ISAS)))
@pytest.mark.parametrize("name", BLOCKS)
def test_no_instruction_set_loses_to_a_lesser_one(
    benchmark: BenchmarkFixture, name: str, better: str, worse: str
) -> None:
    x = rows.make("random", 128, 1024)
    assert lead(benchmark, encoder(name, x, worse), encoder(name, x, better)) > 0.4


@pytest.mark.parametrize("best", ISAS[:-1][:1])
@pytest.mark.parametrize("name", SEARCHED)
def test_searches_gain_by_wider_vectors(benchmark: BenchmarkFixture, name: str, best: str) -> None:
    x = rows.make("random", 64, 1024)
    assert lead(benchmark, encoder(name, x, ISAS[-1]), encoder(name, x, best)) > 1


@pytest.mark.parametrize("name", SEARCHED)
def test_searches_are_several_times_as_fast_as_their_reference(
    benchmark: BenchmarkFixture, name: str
) -> None:
    x = rows.make("random", 4, 1024)
    assert lead(benchmark, reference(name, x), encoder(name, x), rounds=5) > 3


@pytest.mark.parametrize("name", SEARCHED)
def test_searches_are_twice_as_fast_as_llama_cpp(benchmark: BenchmarkFixture, name: str) -> None:
    x = rows.make("random", 32, 1024)
    assert lead(benchmark, llama_cpp(name, x), encoder(name, x)) > 2
