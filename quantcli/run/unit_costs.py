"""What a unit of work costs on this machine: short measurements before a run, a second in all.

Nothing is written: a file is taken to be written as fast as one is read. What is measured is the
processor time of one thread, so that a machine's other work does not count, and the threads of the
run are taken to share all work.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from quantcli.formats.base import Floats
from quantcli.plan.needs import UnitCosts
from quantcli.rounding.codecs import WeightCodec
from quantcli.rounding.options import Options
from quantcli.workers import Workers, workers

_READ = 32 << 20
_HASHED = 4 << 20
_SQUARE, _TILE = 768, 512
_ROWS, _COLUMNS = 64, 1024
_ENOUGH = 0.03
"""Seconds of each measurement, at least."""
_CALLS = 3
_known: dict[Hashable, float] = {}


def measure_unit_costs(
    encoded: Mapping[str, tuple[WeightCodec, bool]], descended: Iterable[str], options: Options,
    *, threads: int, file: Path | None, dtype: str | None = None,
) -> UnitCosts:  # fmt: skip
    """Seconds for each unit of work, on ``threads`` threads.

    ``encoded`` are codecs by what they are called and whether columns have weights, ``descended``
    the names of those whose codes are chosen. ``dtype`` is that of products by torch, None where
    no model is run; ``file`` is one of the source's.
    """

    def known(key: Hashable, task: Callable[[], float]) -> float:
        """Measured once in a process."""
        if key not in _known:
            _known[key] = task()
        return _known[key]

    with workers(1) as pool:
        rows = np.random.default_rng(1).standard_normal((_ROWS, _COLUMNS)).astype(np.float32)
        rows /= np.float32(_COLUMNS**0.5)
        weights = np.ones(_COLUMNS, np.float32)
        encoders = {
            name: known(
                (codec.identity, weighted),
                partial(_encoding, codec, rows, weights if weighted else None, pool),
            )
            / threads
            for name, (codec, weighted) in encoded.items()
        }
        descents = {
            name: known(
                (encoded[name][0].identity, options),
                partial(_descent, encoded[name][0], rows, weights, options, pool),
            )
            / threads
            for name in dict.fromkeys(descended)
        }
    float32 = products = factors = 0.0
    if dtype is not None:
        float32 = known("float32", _product)
        products = known(dtype, partial(_torch_product, dtype)) / threads
        factors = known("factor", _factor) / threads
    hashed = known("hash", _hash) / threads
    read = _reading(file)
    return UnitCosts(products, float32, factors, read, read, hashed, encoders, descents)


def _seconds(task: Callable[[], object]) -> float:
    """Processor time of one call in this thread, the best of as many as fit into a moment."""
    # The first call finds out how to do it, and fills caches.
    task()
    best, total, calls = float("inf"), 0.0, 0
    while total < _ENOUGH or calls < _CALLS:
        began = time.thread_time()
        task()
        took = time.thread_time() - began
        best, total, calls = min(best, took), total + took, calls + 1
    return best


def _descent(
    codec: WeightCodec, rows: Floats, weights: Floats, options: Options, pool: Workers
) -> float:
    """Seconds a weight for feedback and sweeps, products with a whole Hessian left out."""
    from quantcli.statistics.hessian import prepare_hessian

    columns = min(256, rows.shape[1])
    part = np.ascontiguousarray(rows[:, :columns])
    hessian = prepare_hessian(np.eye(columns) + 0.1, options.damping, options.column_order)
    found = _seconds(lambda: codec.descend(part, hessian, weights[:columns], options, pool))
    return found / part.size


def _encoding(codec: WeightCodec, rows: Floats, weights: Floats | None, pool: Workers) -> float:
    """Seconds a weight for the encoder."""
    return _seconds(lambda: codec.encode(rows, weights, pool)) / rows.size


def _product() -> float:
    """Seconds for an operation of NumPy's products."""
    square = np.ones((_SQUARE, _SQUARE), np.float32)
    return _seconds(lambda: square @ square) / (2 * _SQUARE**3)


def _torch_product(dtype: str) -> float:
    """The same of a layer's products in torch, of which a thread computes a tile."""
    import torch

    from quantcli.layerwise.model_run import DTYPES
    from quantcli.layerwise.steady import use_threads

    use_threads(1)
    rows = torch.ones((_TILE, _SQUARE), dtype=DTYPES[dtype])
    out = torch.empty((_TILE, 2 * _TILE), dtype=rows.dtype)
    with torch.inference_mode():
        found = _seconds(lambda: torch.mm(rows, rows.mT, out=out[:, :_TILE]))
    return found / float(2 * rows.numel() * _TILE)


def _factor() -> float:
    """Seconds for an operation of a factorisation."""
    import torch

    from quantcli.layerwise.steady import cholesky, use_threads

    use_threads(1)
    square = torch.eye(_SQUARE) * 2
    return _seconds(lambda: cholesky(square)) / (_SQUARE**3 / 3)


def _hash() -> float:
    """Seconds for a byte of a digest."""
    body = bytes(_HASHED)
    return _seconds(lambda: hashlib.sha256(body).digest()) / _HASHED


def _reading(file: Path | None) -> float:
    """Seconds for a byte of a file, which the system may have in memory."""
    if file is None or not file.is_file():
        return 0.0
    began = time.perf_counter()
    with file.open("rb") as stream:
        count = len(stream.read(_READ))
    return (time.perf_counter() - began) / max(1, count)
