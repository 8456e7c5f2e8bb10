"""The protocol of a rounder, and the rounders by the name that a user gives.

A rounder chooses the codes of one matrix in the codec that it will be stored in. A layer's tensors
are rounded as its inputs were measured, and what a rounder returns is compared with rounding to
nearest on held-out inputs (`quantcli.rounding.tensor`). Plug-ins register one in the entry-point
group ``quantcli.rounders``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Protocol

from quantcli.formats.base import Bytes, Floats
from quantcli.registry import Registry, lacks_attributes
from quantcli.rounding.codecs import WeightCodec
from quantcli.rounding.options import Options
from quantcli.statistics.matrix_statistics import MatrixStatistics
from quantcli.workers import Workers

NEEDS = ("importance", "hessian", "fisher")
"""Mean squares of the inputs, means of x x^T, and the Fisher information of the outputs."""


class Rounder(Protocol):
    """From float weights and statistics to packed rows of a codec.

    One with an attribute ``by_rows`` that is true chooses each row by itself where the outputs'
    Fisher information is not known, and may be given some rows of a matrix at a time.
    """

    @property
    def name(self) -> str:
        """The name in ``--method``."""

    @property
    def options(self) -> tuple[str, ...]:
        """The fields of `Options` that it reads."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that it reads, of `NEEDS`.

        One that needs the Hessian is taken to feed errors back: transforms before it minimise
        what feedback cannot make up for.
        """

    def fits(self, codec: WeightCodec) -> bool:
        """Whether it can choose this codec's codes; where not, weights are rounded to nearest."""

    def round(
        self, codec: WeightCodec, rows: Floats, statistics: MatrixStatistics, options: Options,
        pool: Workers,
    ) -> Bytes:  # fmt: skip
        """Packed rows of ``rows`` (n, columns), float32: uint8 of shape (n, row bytes).

        ``statistics`` holds the outputs' Fisher information only where the rounder needs it and a
        row of the codec can be rounded by itself.
        """


def _lack(found: Any) -> str | None:
    lack = lacks_attributes("name", "options", "needs", "fits", "round")(found)
    if lack is not None:
        return lack
    known = tuple(field.name for field in fields(Options))
    for what, named, all_of in (
        ("option", found.options, known), ("statistic", found.needs, NEEDS)
    ):  # fmt: skip
        for name in named:
            if name not in all_of:
                return f"there is no {what} {name!r} (there are {', '.join(all_of)})"
    return None


ROUNDERS = Registry(
    "rounder",
    "rounders",
    {"gptq": "quantcli.rounding.gptq:GPTQ", "nearest": "quantcli.rounding.nearest:NEAREST"},
    _lack,
)
"""`Rounder` objects."""
