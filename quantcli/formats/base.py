"""What a block format is: constants, and a NumPy reference that reads like the specification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One of GGUF's tensor types.

    ``quantize`` takes float32 rows of shape (n, columns) and one importance weight per column
    (or None) and returns the packed rows, uint8 of shape (n, row_bytes(columns)); ``dequantize``
    is its inverse up to rounding. Both are the slow NumPy reference; `quantcli.formats.native`
    gives the same bytes by a kernel where there is one for ``type_id``, and calls them where not.
    """

    name: str
    type_id: int | None
    """ggml's id; None for a format that no GGUF can hold, only weights decoded from it."""
    block: int
    """Weights in a block; a row's length must be a multiple of it."""
    nbytes: int
    """Bytes of a packed block."""
    quantize: Callable[[Floats, Floats | None], Bytes]
    dequantize: Callable[[Bytes], Floats]
    half_scales: tuple[int, ...] = ()
    """Byte offsets of the block's float16 scales, which must be finite."""
    byte_scales: tuple[int, ...] = ()
    """Byte offsets of the block's 8-bit float scales, whose last code is for what overflows."""
    holds: float = 0.0
    """A block with such a last code is good if none of its weights exceeds this in magnitude."""
    first_infinite: Callable[[Bytes], int] | None = None
    """Where the scale lies in pieces instead: takes flat packed bytes and gives the first block
    whose scale is infinite or NaN, or -1."""
    fallback: str | None = None
    """The format that llama.cpp takes instead when ``block`` does not divide a row."""
    needs_importance: bool = False
    """llama.cpp refuses to encode this format without an importance matrix."""

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes / self.block

    def fits(self, columns: int) -> bool:
        """Whether rows of ``columns`` weights divide into whole blocks."""
        return columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of a packed row; ``columns`` must fit."""
        return columns // self.block * self.nbytes
