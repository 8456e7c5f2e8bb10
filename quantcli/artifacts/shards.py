"""How tensors are divided into files of a limited size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def split_shards(
    tensors: Iterable[T], nbytes: Callable[[T], int], limit: int | None
) -> list[list[T]]:
    """``tensors``, in order, in shards of at most ``limit`` bytes; one shard without a limit.

    As llama.cpp's gguf-split and transformers count: headers do not, and a tensor that is larger
    than the limit gets a shard of its own.
    """
    shards: list[list[T]] = [[]]
    filled = 0
    for tensor in tensors:
        size = nbytes(tensor)
        if limit is not None and shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards
