"""The codes that a method chose, as a model folder wants them: by stored matrix and row.

A method works on GGUF tensors, whose rows may be in another order than the checkpoint's (llama's q
and k), or come from several of its tensors. No row depends on another's, so each is found where
the GGUF tensor's pieces say that it went. What no method rounded is rounded to nearest.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from quantcli.artifacts.model_folder import ModelFolder
from quantcli.artifacts.nearest_codes import CodeSource, RoundToNearest
from quantcli.artifacts.slabs import SLAB_BYTES
from quantcli.checkpoint_view import find_uses, read_back
from quantcli.formats.integer import IntegerCodes
from quantcli.rounding.codecs import GridCodec
from quantcli.rounding.run_store import EncodedStore
from quantcli.types import Matrix


def stored_codes(job: ModelFolder, encoded: EncodedStore) -> CodeSource:
    """A `CodeSource` of ``encoded``, the tensors that a method rounded for ``job``."""
    scheme = job.plan.scheme
    if scheme is None:
        raise ValueError("the plan has no integer grid")
    codec = GridCodec(scheme.grid, scheme.label)
    nearest = RoundToNearest(job.plan, job.model.store, None, SLAB_BYTES)
    uses = find_uses(tensor for tensor in job.model.tensors if tensor.name in encoded)

    def codes(matrix: Matrix, start: int, rows: NDArray[Any]) -> IntegerCodes:
        found = uses.get(matrix.source, [])
        if not any(use.tensor.name == matrix.tensor for use in found):
            return nearest(matrix, start, rows)
        first = matrix.first + start
        coded = codec.unpack(
            read_back(
                found, first, first + len(rows),
                lambda tensor, low, high: encoded.read_rows(tensor.name, low, high),
            )
        )  # fmt: skip
        if scheme.grid.strategy != "tensor":
            return coded
        zeros = None if coded.zeros is None else coded.zeros[:1]
        return IntegerCodes(coded.codes, coded.scales[:1], zeros)

    return codes
