"""Streaming the weights gives the numbers of the whole tensors, whatever the threads."""

from __future__ import annotations

import threading

import gguf
import numpy as np
import pytest

from quantcli.errors import SourceError
from quantcli.report.stats import measure_rows
from quantcli.report.weights import WeightSource, WeightStatsDone, measure_weights
from quantcli.types import Progress


def _source(name: str, values: np.ndarray, dtype: str = "F32") -> WeightSource:
    rows = values.reshape(-1, values.shape[-1])
    return WeightSource(
        name, values.shape, dtype, values.nbytes, lambda start, stop: rows[start:stop].copy()
    )


RNG = np.random.default_rng(7)
ARRAYS = {
    "large": RNG.standard_normal((3000, 1024)).astype(np.float32),
    "small": RNG.standard_normal((5, 7)).astype(np.float32),
    "vector": RNG.standard_normal(300).astype(np.float32),
    "experts": RNG.standard_t(3, (4, 64, 128)).astype(np.float32),
}


def _measure(sources, threads):
    *events, last = measure_weights(sources, threads)
    assert isinstance(last, WeightStatsDone)
    return events, last.stats


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_numbers_are_those_of_the_whole_tensors(threads):
    events, stats = _measure([_source(*item) for item in ARRAYS.items()], threads)
    assert list(stats) == list(ARRAYS)
    for name, values in ARRAYS.items():
        whole = measure_rows(values.reshape(-1, values.shape[-1]))
        assert stats[name].moments.count == values.size
        assert stats[name].moments.kurtosis == pytest.approx(whole.moments.kurtosis, rel=1e-9)
        assert stats[name].outliers.tolist() == whole.outliers.tolist()
        assert stats[name].abs_max.tolist() == whole.abs_max.tolist()
    done = [event.done for event in events]
    assert all(isinstance(event, Progress) for event in events)
    assert done == sorted(done)
    assert done[-1] == events[-1].total == sum(a.nbytes for a in ARRAYS.values())


def test_the_number_of_threads_changes_no_bit():
    runs = [_measure([_source(*item) for item in ARRAYS.items()], n)[1] for n in (1, 4)]
    for name in ARRAYS:
        assert runs[0][name].moments == runs[1][name].moments


def test_memory_holds_some_slabs_and_not_the_tensor():
    held, most, lock = 0, 0, threading.Lock()

    class Rows(np.ndarray):
        def __del__(self):
            nonlocal held
            with lock:
                held -= 1

    def read(start: int, stop: int) -> np.ndarray:
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return np.ones((stop - start, 1024), np.float32).view(Rows)

    source = WeightSource("w", (100_000, 1024), "F32", 400 << 20, read)
    _, stats = _measure([source], 2)
    assert stats["w"].moments.count == 100_000 * 1024
    # Each of 2 threads holds the slab that it works on, some of its views are alive besides.
    assert most < 100


def test_an_error_of_a_reader_ends_the_work():
    def read(start: int, stop: int) -> np.ndarray:
        raise SourceError("m.safetensors: ends early")

    with pytest.raises(SourceError, match="ends early"):
        list(measure_weights([WeightSource("w", (9, 9), "F32", 324, read)], 2))


def test_closing_the_work_early_stops_the_threads():
    before = threading.active_count()
    work = measure_weights([_source("large", ARRAYS["large"])], 2)
    next(work)
    work.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_1", "IQ4_NL", "MXFP4", "TQ2_0"])
def test_blocks_are_decoded_as_the_gguf_library_does(name):
    kind = gguf.GGMLQuantizationType[name]
    values = RNG.standard_normal((6, 512)).astype(np.float32)
    try:
        blocks = gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = RNG.integers(0, 60, (6, 512 // block * nbytes)).astype(np.uint8)
    expected = measure_rows(gguf.quants.dequantize(blocks, kind))
    source = WeightSource("w", (6, 512), name, blocks.nbytes, lambda a, b: blocks[a:b].copy())
    _, stats = _measure([source], 1)
    assert stats["w"].moments.count == 6 * 512
    assert stats["w"].moments.std == pytest.approx(expected.moments.std, rel=1e-6)
    assert stats["w"].abs_max.tolist() == pytest.approx(expected.abs_max.tolist(), rel=1e-6)


def test_blocks_that_nobody_decodes_are_refused():
    blocks = np.zeros((2, 36), np.uint8)
    source = WeightSource("blk.0.w", (2, 32), "Q8_1", 72, lambda a, b: blocks[a:b])
    with pytest.raises(SourceError, match=r"'blk.0.w' is stored as Q8_1, which cannot be decoded"):
        list(measure_weights([source], 1))
