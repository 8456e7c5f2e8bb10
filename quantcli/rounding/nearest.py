"""Round to nearest, ranges weighted by the inputs' importance: what other rounders have to beat."""

from __future__ import annotations

from quantcli.formats.base import Bytes, Floats
from quantcli.rounding.codecs import WeightCodec
from quantcli.rounding.options import Options
from quantcli.statistics.matrix_statistics import MatrixStatistics
from quantcli.workers import Workers


class _Nearest:
    """Rounding to nearest as a `Rounder`."""

    name = "nearest"
    options = ()
    by_rows = True
    """Without the outputs' Fisher information rows are independent."""
    needs = ("importance",)

    def fits(self, codec: WeightCodec) -> bool:
        """All codecs encode."""
        return True

    def round(
        self, codec: WeightCodec, rows: Floats, statistics: MatrixStatistics, options: Options,
        pool: Workers,
    ) -> Bytes:  # fmt: skip
        """The rows as the codec's encoder packs them."""
        return codec.encode(rows, statistics.importance, pool)


NEAREST = _Nearest()
