"""Products of float32 matrices on the CPU, cut as `quantcli.layerwise.steady` cuts.

NumPy's BLAS and the MKL inside torch take half as long registers as an AMD processor has, while
oneDNN, which torch carries too, takes them all and is twice as fast there; elsewhere it is as fast.
torch calls it for linear layers that were made ready for inference, and so does `multiply`. Tiles
do not depend on the number of threads, so neither does a sum's order; nobody spins when there is
nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from quantcli.artifacts.scratch import forget_pages
from quantcli.formats.base import Floats
from quantcli.layerwise.steady import linear_product, run_tasks

TILE = 512
"""Rows and columns of a large product that one thread computes at once."""
SHARE = 64
"""Rows of a small one."""
_SMALL = 256


def multiply(a: Floats, b: Floats) -> Floats:
    """``a`` (m, k) times ``b`` (k, n) in the present thread, for a tile of a larger product.

    ``b`` or its transpose is contiguous. Inside of `run_tasks` torch uses one thread.
    """
    if not a.size or not b.size:
        return np.zeros((len(a), b.shape[1]), np.float32)
    turned = torch.from_numpy(b.T)
    own = linear_product()
    if own is None:
        found = torch.mm(torch.from_numpy(a), turned.T)
    else:
        found = own(torch.from_numpy(a), turned)
    values: Floats = found.numpy()
    return values


def product(a: Floats, b: Floats) -> Floats:
    """``a`` (m, k) times ``b`` (k, n), float32, all threads at work."""
    out = np.empty((len(a), b.shape[1]), np.float32)

    def tile(rows: slice, columns: slice, strip: Floats) -> None:
        out[rows, columns] = multiply(a[rows], strip)

    for start in range(0, b.shape[1], TILE):
        columns = slice(start, start + TILE)
        strip = b[:, columns]
        if not (strip.flags.c_contiguous or strip.flags.f_contiguous):
            strip = np.ascontiguousarray(strip)
        run_tasks([partial(tile, rows, columns, strip) for rows in shares(len(a))])
    return out


def shares(rows: int, step: int | None = None) -> Sequence[slice]:
    """Rows in parts for the threads: large ones of many rows, else small ones."""
    step = step or (SHARE if rows <= _SMALL else TILE)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def add_gram(into: Any, values: torch.Tensor, inside: slice = slice(None)) -> None:
    """Add ``values.T @ values`` to the square of ``into`` that ``inside`` cuts out, on and below
    the diagonal; see `mirror`.

    ``into`` is float64 or float32. A pair of columns is multiplied once. It may be a mapped file:
    of a large one some rows are in memory at a time.
    """
    turned = values.T.contiguous().numpy()
    count, square = len(turned), into[inside, inside]

    def tile(rows: slice, columns: slice) -> None:
        square[rows, columns] += multiply(turned[rows], turned[columns].T)

    for start in range(0, count, TILE):
        rows = slice(start, min(start + TILE, count))
        run_tasks([partial(tile, rows, columns) for columns in shares(rows.stop, TILE)])
        forget_pages(into)


def mirror(square: Any) -> None:
    """Set what is above the diagonal of ``square`` to what is below it."""
    count = len(square)

    def tile(rows: slice, columns: slice) -> None:
        part = square[rows, columns]
        square[columns, rows] = np.tril(part) + np.tril(part, -1).T if rows == columns else part.T

    for start in range(0, count, TILE):
        rows = slice(start, min(start + TILE, count))
        run_tasks([partial(tile, rows, columns) for columns in shares(rows.stop, TILE)])
        forget_pages(square)
