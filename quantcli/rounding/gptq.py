"""GPTQ: error feedback among columns, then coordinate descent, and feedback among rows.

Columns are rounded in order and each error is passed on to later ones, in the codec's own way
(`quantcli.rounding.block_feedback`, `quantcli.rounding.grid_feedback`). Where the Fisher
information of the outputs is known, groups of rows make up for one another's errors too
(`quantcli.rounding.row_feedback`).
"""

from __future__ import annotations

from quantcli.formats.base import Bytes, Floats
from quantcli.rounding.codecs import WeightCodec
from quantcli.rounding.options import Options
from quantcli.rounding.row_feedback import round_by_rows
from quantcli.statistics.matrix_statistics import MatrixStatistics
from quantcli.workers import Workers


class _Gptq:
    """GPTQ as a `Rounder`."""

    name = "gptq"
    options = (
        "damping", "column_order", "sweeps", "block_sweeps", "propagate", "fisher_windows",
    )  # fmt: skip
    by_rows = True
    """Without the outputs' Fisher information rows are independent."""
    needs = ("importance", "hessian", "fisher")

    def fits(self, codec: WeightCodec) -> bool:
        """Those whose codes can be chosen one by one."""
        return codec.has_codes

    def round(
        self, codec: WeightCodec, rows: Floats, statistics: MatrixStatistics, options: Options,
        pool: Workers,
    ) -> Bytes:  # fmt: skip
        """Packed rows, rounded under the Hessian of the inputs and, if known, of the outputs."""
        hessian, importance = statistics.hessian, statistics.importance
        if statistics.outputs is None:
            return codec.descend(rows, hessian, importance, options, pool)
        return round_by_rows(codec, rows, hessian, importance, statistics.outputs, options, pool)


GPTQ = _Gptq()
