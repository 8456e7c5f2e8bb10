"""What rounding a matrix takes: see `quantcli.rounding.tensor` and the rounders.

While a tensor is rounded, the sums of its whole layer lie in mapped files, the output Fisher
information of the layer is in memory, and so are its own statistics and those of the tensor before.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantcli.plan.layer_sizes import MatrixSize
from quantcli.plan.needs import Work
from quantcli.rounding.options import Options
from quantcli.statistics.input_needs import factor_bytes, factor_work, held_bytes, strips

_ROWS = 4
"""Copies of a matrix in float32: weights, errors, and two of feedback's own."""
_PART, _PART_ROWS, _JOINED = 1 << 24, 6, 3
"""Weights that are rounded at once of rows that know nothing of one another, copies of them in
float32, and copies of packed rows besides one when all parts are put together."""
_LOSSES = 3
"""Losses that are computed for each result: of the weights, of nearest codes, of those chosen."""
_WIDE, _SKETCH = 2048, 192
"""From so many columns on they are estimated, and by a sketch of how many
(`quantcli.statistics.sketched_loss`)."""
_FISHER, _TIES = 4, 8
"""Bytes for an element of a strip's Fisher information: its mean, and while the strip is rounded
the damped mean and the factor."""
_DRIFT = 24
"""Bytes for an element of a Hessian more where a prefix's drift is corrected."""


def preparing_bytes(matrix: MatrixSize, *, drift: bool = False) -> int:
    """Memory while the statistics of one matrix of a tensor are prepared, its weights read."""
    more = _DRIFT * matrix.columns**2 if drift else 0
    return factor_bytes(matrix.columns) + 4 * matrix.rows * matrix.columns + more


def rounding_bytes(matrix: MatrixSize, *, fisher: bool, drift: bool = False) -> int:
    """Memory while one matrix of a tensor is rounded, its statistics included."""
    rows = 4 * matrix.rows * matrix.columns
    held = held_bytes(matrix.columns) + (_DRIFT * matrix.columns**2 if drift else 0)
    if not fisher:
        return held + _ROWS * rows
    sizes = strips(matrix.rows)
    means = _FISHER * sum(size**2 for size in sizes)
    most = max(sizes)
    factoring = factor_bytes(most, in_order=False) + 3 * rows
    # Errors of a wide matrix are those of a strip, and once more while others ask for them.
    beside = rows + 8 * most * matrix.columns if matrix.columns >= _WIDE else _ROWS * rows
    return held + means + max(_TIES * most**2 + beside, factoring)


def parted_bytes(matrix: MatrixSize, stored: int) -> int:
    """The same where rows know nothing of one another, besides one result of ``stored`` bytes.

    There are two of all that was rounded, and then parts are put together.
    """
    part = min(_PART, matrix.rows * matrix.columns)
    most = max(4 * _PART_ROWS * part + stored, _JOINED * stored)
    return held_bytes(matrix.columns) + most


def matrix_work(
    matrix: MatrixSize, formats: Mapping[str, bool], options: Options, *, fisher: bool
) -> Work:
    """Work for all matrices of a tensor; ``formats`` says which of them codes are chosen in."""
    rows, columns = matrix.rows, matrix.columns
    by_columns = 2.0 * rows * columns**2
    by_rows = 2.0 * columns * sum(size * size for size in strips(rows)) if fisher else 0.0
    total = factor_work(columns).times(matrix.matrices)
    if fisher:
        for size in strips(rows):
            total += factor_work(size)
    losses = _LOSSES * (by_columns + by_rows)
    if columns >= _WIDE:
        each = 2.0 * _SKETCH * (2.0 * rows * columns + by_rows / (2 * columns))
        losses = _LOSSES * each + 4.0 * _SKETCH * columns**2
    for name, chosen in formats.items():
        flops = losses
        work = Work(encoded={name: float(rows * columns)})
        if chosen:
            flops += by_columns * (0.5 + options.sweeps) + 1.5 * by_rows
            work += Work(descended={name: float(rows * columns)})
        total += (work + Work(float32=flops)).times(matrix.matrices)
    return total
