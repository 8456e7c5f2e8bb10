"""A stored output head that is the embeddings once more: one matrix is enough.

A tied model may hold both. transformers unties them when they differ, so a head is left out only
if every value is the same; the two are compared slab by slab, up to the first difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantcli.types import OutputTensor, TensorStore

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_SLAB = 1 << 24
"""Bytes that are compared at a time."""


def without_equal_head(
    tensors: Sequence[OutputTensor], store: TensorStore
) -> tuple[list[OutputTensor], str | None]:
    """The tensors of a tied model without a head that equals its embeddings, and a remark on it."""
    named = {tensor.name: tensor for tensor in tensors}
    head, embedding = named.get(_HEAD), named.get(_EMBEDDING)
    if head is None or embedding is None or not _is_equal(head, embedding, store):
        return list(tensors), None
    return [tensor for tensor in tensors if tensor is not head], (
        f"{head.pieces[0].source} and {embedding.pieces[0].source} hold the same values and are "
        "tied, so they are one matrix"
    )


def _is_equal(head: OutputTensor, embedding: OutputTensor, store: TensorStore) -> bool:
    plain = [t.pieces[0] for t in (head, embedding) if len(t.pieces) == 1]
    if len(plain) < 2 or (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return False
    if any(piece.order is not None or piece.start for piece in plain):
        return False
    step = max(1, _SLAB * head.rows // max(1, store.tensors[plain[0].source].nbytes))
    for start in range(0, head.rows, step):
        stop = min(start + step, head.rows)
        first, second = (store.read_rows(piece.source, start, stop) for piece in plain)
        if not np.array_equal(first.view(np.uint8), second.view(np.uint8)):
            return False
    return True
