"""What a calibration measured of every tensor's inputs, wherever the values come from."""

from __future__ import annotations

from typing import Protocol

from quantcli.formats.base import Floats


class InputStatistics(Protocol):
    """Statistics of the inputs x of a GGUF tensor's matrix, x having one value per column."""

    def count(self, name: str, matrix: int = 0) -> int:
        """Inputs that were seen."""

    def hessian(self, name: str, matrix: int = 0) -> Floats:
        """The mean of x x^T, float32 of shape (columns, columns)."""

    def abs_max(self, name: str, matrix: int = 0) -> Floats:
        """The largest |x|, float32 of shape (columns,)."""

    def mean_abs(self, name: str, matrix: int = 0) -> Floats:
        """The mean |x|, float32 of shape (columns,)."""
