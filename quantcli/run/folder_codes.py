"""The codes that a method chose, as a model folder wants them: by stored matrix and row.

A method works on GGUF tensors, whose rows may be in another order than the checkpoint's (llama's q
and k), or come from several of its tensors. No row depends on another's, so each is found where
the GGUF tensor's pieces say that it went. What no method rounded is rounded to nearest, also
those rows of a matrix that GGUF holds transposed (the keys of latent attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.model_folder import ModelFolder
from quantcli.artifacts.nearest_codes import CodeSource, RoundToNearest
from quantcli.artifacts.slabs import SLAB_BYTES
from quantcli.checkpoint_view import Use, find_uses, read_back
from quantcli.formats.integer import GridCodes
from quantcli.rounding.codecs import GridCodec
from quantcli.rounding.run_store import EncodedStore
from quantcli.types import Matrix


def stored_codes(job: ModelFolder, encoded: EncodedStore) -> CodeSource:
    """A `CodeSource` of ``encoded``, the tensors that a method rounded for ``job``."""
    codecs = {
        item.matrix.module: GridCodec(item.scheme.grid, item.scheme.label)
        for item in job.plan.items
        if item.scheme is not None
    }
    nearest = RoundToNearest(job.plan, job.model.store, None, SLAB_BYTES)
    uses = find_uses(tensor for tensor in job.model.tensors if tensor.name in encoded)

    def codes(matrix: Matrix, start: int, rows: NDArray[Any]) -> GridCodes:
        found = uses.get(matrix.source, [])
        if not any(use.tensor.name == matrix.tensor for use in found):
            return nearest(matrix, start, rows)
        codec, first = codecs[matrix.module], matrix.first + start
        last = first + len(rows)
        if matrix.turned is not None:
            coded = codec.unpack(encoded.read_rows(matrix.tensor, first, last))
            coded = _in_stored_order(coded, matrix.turned.turned_columns)
        else:
            coded = codec.unpack(
                read_back(
                    found, first, last,
                    lambda tensor, low, high: encoded.read_rows(tensor.name, low, high),
                )
            )  # fmt: skip
        held = _held(found, first, last)
        if not held.all():
            others = nearest(matrix, start, rows)
            if codec.grid.strategy == "tensor":
                return others
            coded = _merge(coded, held, others)
        if codec.grid.strategy != "tensor":
            return coded
        zeros = None if coded.zeros is None else coded.zeros[:1]
        return GridCodes(coded.codes, coded.scales[:1], zeros, coded.whole)

    return codes


def _in_stored_order(coded: GridCodes, order: NDArray[np.int64]) -> GridCodes:
    """The codes with columns moved back from where a GGUF tensor has them, whole groups at once."""
    size = coded.codes.shape[1] // coded.scales.shape[1]
    groups = np.argsort(order[::size])
    zeros = None if coded.zeros is None else coded.zeros[:, groups]
    codes = coded.codes[:, np.argsort(order)]
    return GridCodes(codes, coded.scales[:, groups], zeros, coded.whole)


def _held(uses: Sequence[Use], start: int, stop: int) -> NDArray[np.bool_]:
    """Which of the stored rows ``start:stop`` are in any of ``uses``."""
    found = np.zeros(stop - start, np.bool_)
    for piece in (use.piece for use in uses):
        low, high = max(start, piece.start), min(stop, piece.start + piece.stored_rows)
        if low < high:
            own = piece.output_rows(low - piece.start, high - piece.start) >= 0
            found[low - start : high - start] |= own
    return found


def _merge(coded: GridCodes, held: NDArray[np.bool_], other: GridCodes) -> GridCodes:
    """The codes of the rows that are ``held``, those of ``other`` elsewhere."""

    def choose(ours: Any, theirs: Any) -> Any:
        return None if ours is None else np.where(held[:, None], ours, theirs)

    return GridCodes(
        choose(coded.codes, other.codes),
        choose(coded.scales, other.scales),
        choose(coded.zeros, other.zeros),
        coded.whole,
    )
