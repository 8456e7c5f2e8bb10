"""The codes that a method chose, as a model folder wants them: by stored matrix and row.

A method works on GGUF tensors, whose rows may be in another order than the checkpoint's (llama's q
and k), or come from several of its tensors. No row depends on another's, so each is found where
the GGUF tensor's pieces say that it went. What no method rounded is rounded to nearest.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.folder_job import FolderJob
from quantcli.artifacts.gguf_file import SLAB_BYTES
from quantcli.formats.base import Bytes
from quantcli.formats.integer import IntegerCodes
from quantcli.rounding.codecs import GridCodec
from quantcli.rounding.nearest import CodeSource, RoundToNearest
from quantcli.rounding.run_store import EncodedStore
from quantcli.transforms.checkpoint_view import piece_rows
from quantcli.types import Matrix, Piece


def stored_codes(job: FolderJob, encoded: EncodedStore) -> CodeSource:
    """A `CodeSource` of ``encoded``, the tensors that a method rounded for ``job``."""
    scheme = job.plan.scheme
    if scheme is None:
        raise ValueError("the plan has no integer grid")
    codec = GridCodec(scheme.grid, scheme.label)
    nearest = RoundToNearest(job.plan, job.model.store, None, SLAB_BYTES)
    places: defaultdict[str, list[tuple[str, int, Piece]]] = defaultdict(list)
    for tensor in job.model.tensors:
        first = 0
        for piece in tensor.pieces:
            if tensor.name in encoded:
                places[piece.source].append((tensor.name, first, piece))
            first += piece.rows

    def codes(matrix: Matrix, start: int, rows: NDArray[Any]) -> IntegerCodes:
        if not any(tensor == matrix.tensor for tensor, _, _ in places[matrix.source]):
            return nearest(matrix, start, rows)
        first = matrix.first + start
        last = first + len(rows)
        packed: Bytes | None = None
        for tensor, offset, piece in places[matrix.source]:
            low, high = max(first, piece.start), min(last, piece.start + piece.rows)
            if low >= high:
                continue
            own = offset + piece_rows(piece)[low - piece.start : high - piece.start]
            # Rows change places within a head, so this is little more than what is wanted.
            span = encoded.read_rows(tensor, int(own.min()), int(own.max()) + 1)
            if packed is None:
                packed = np.empty((len(rows), span.shape[1]), np.uint8)
            packed[low - first : high - first] = span[own - own.min()]
        if packed is None:
            raise ValueError(f"{matrix.source} has rows that are in no GGUF tensor")
        found = codec.unpack(packed)
        if scheme.grid.strategy != "tensor":
            return found
        zeros = None if found.zeros is None else found.zeros[:1]
        return IntegerCodes(found.codes, found.scales[:1], zeros)

    return codes
