"""A wide Hessian and its factor in the room of one.

The matrix is symmetric and its factor triangular, so of each panel of columns the rows from its own
on hold the matrix and the rows above them the factor. Factoring works in place: panels are taken
from the last to the first, each after all that come after it were taken off (Golub and Van Loan,
Matrix Computations, 4.2.5, upside down). For C columns, all in float32:

    bytes = 4 C^2 + 2 KiB C,

the second part for what both need of a panel's own columns; making one takes the same, and 4 KiB C
for the rows that are being read. A product with some columns of the matrix takes 1 KiB C besides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from quantcli.formats.base import Floats
from quantcli.layerwise.products import TILE, multiply, product, shares
from quantcli.layerwise.steady import run_tasks
from quantcli.statistics.hessian import (
    Hessian,
    HessianBlock,
    Slopes,
    fill_dead,
    raise_damping,
)

PANEL = 256
"""Columns of a panel: those that the kernels take at once."""

ReadRows = Callable[[slice], Floats]
"""Some rows of a symmetric matrix, float32 (rows, columns)."""


class PanelHessian(Hessian):
    """A `Hessian` in its columns' own order, as panels.

    ``panels`` (columns, at most `PANEL`) hold the matrix from their own rows on, and above these
    the factor; ``squares`` are the factor of their own rows.
    """

    def __init__(
        self, panels: Sequence[Floats], squares: Sequence[Floats], pivots: Floats, damping: float
    ) -> None:
        self.__dict__.update(
            panels=panels, squares=squares, pivots=pivots, damping=damping, order=None,
            _parts={}, _together={},
        )  # fmt: skip

    panels: Sequence[Floats]
    squares: Sequence[Floats]

    @property
    def matrix(self) -> Floats:
        """A copy, as large as all of this."""
        whole = np.empty((len(self.pivots),) * 2, np.float32)
        for columns in cut_panels(len(whole)):
            whole[:, columns] = self._strip(columns)
        return whole

    @property
    def factor(self) -> Floats:
        """A copy, as large as all of this."""
        whole = np.zeros((len(self.pivots),) * 2, np.float32)
        for columns, panel, square in zip(
            cut_panels(len(whole)), self.panels, self.squares, strict=True
        ):
            whole[: columns.start, columns] = panel[: columns.start]
            whole[columns, columns] = square
        return whole

    def own(self, columns: slice) -> Floats:
        """The matrix of some neighbouring columns alone, contiguous."""
        pieces = self._pieces(columns)
        if len(pieces) == 1:
            number, inside, _ = pieces[0]
            rows = slice(number * PANEL + inside.start, number * PANEL + inside.stop)
            return np.ascontiguousarray(self.panels[number][rows, inside])
        square = np.empty((columns.stop - columns.start,) * 2, np.float32)
        for number, inside, place in pieces:
            for other, within, below in pieces:
                if other >= number:
                    rows = slice(other * PANEL + within.start, other * PANEL + within.stop)
                    block = self.panels[number][rows, inside]
                    square[place, below], square[below, place] = block.T, block
        return square

    def slope(self, errors: Floats, columns: slice) -> Floats:
        """``errors`` (n, all columns) times some neighbouring columns of the matrix."""
        return product(errors, self._strip(columns))

    def ahead(self, errors: Floats, columns: slice) -> Floats:
        """What the errors of the columns before ``columns`` ask of these."""
        first = columns.start
        if first == 0:
            return np.zeros((len(errors), columns.stop), np.float32)
        return product(errors[:, :first], self._factor(slice(0, first), columns))

    def spread(self, values: Floats) -> Floats:
        """A root of the matrix times ``values`` (columns, few)."""
        scaled = np.asarray(values * np.sqrt(self.pivots)[:, None], np.float32)
        found = np.zeros_like(scaled)
        for own, panel, square in zip(
            cut_panels(len(found)), self.panels, self.squares, strict=True
        ):
            found[: own.start] += product(panel[: own.start], scaled[own])
            found[own] += product(square, scaled[own])
        return found

    def gather(self, values: Floats) -> Floats:
        """The inverse of that root's transpose times ``values`` (columns, few)."""
        found = np.asarray(values / np.sqrt(self.pivots)[:, None], np.float32)

        def solve(own: slice, square: Floats) -> None:
            left, upper = torch.from_numpy(found[own]), torch.from_numpy(square)
            left[:] = torch.linalg.solve_triangular(upper.T, left, upper=False, unitriangular=True)

        for own, panel, square in zip(
            cut_panels(len(found)), self.panels, self.squares, strict=True
        ):
            found[own] -= product(panel[: own.start].T, found[: own.start])
            run_tasks([partial(solve, own, square)])
        return found

    def follow(self, errors: Floats) -> Slopes:
        """`slope` of one panel after the other, while ``errors`` change; by one thread."""
        return _PanelSlopes(self, errors)

    def part(self, columns: slice) -> HessianBlock:
        """What concerns ``columns``."""
        key = columns.start, columns.stop
        if key not in self._parts:
            number, inside, _ = self._pieces(columns)[0]
            square = self.squares[number]
            whole = inside == slice(0, len(square)) and columns.stop - columns.start == len(square)
            factor = square if whole else self._factor(columns, columns)
            self._parts[key] = HessianBlock(factor, self.pivots[columns])
        return self._parts[key]

    def keep_together(self, width: int) -> Hessian:
        """This."""
        return self

    def _strip(self, columns: slice) -> Floats:
        """Some columns of the matrix, (columns, few), contiguous."""
        strip = np.empty((len(self.pivots), columns.stop - columns.start), np.float32)
        for number, inside, place in self._pieces(columns):
            start = number * PANEL
            panel = self.panels[number]
            strip[start:, place] = panel[start:, inside]
            for other in range(number):
                rows = slice(other * PANEL, (other + 1) * PANEL)
                mirrored = slice(start + inside.start, start + inside.stop)
                strip[rows, place] = self.panels[other][mirrored].T
        return strip

    def _factor(self, rows: slice, columns: slice) -> Floats:
        """Some rows of some columns of the factor, contiguous; no row is after the columns."""
        found = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        for number, inside, place in self._pieces(columns):
            start = number * PANEL
            above = min(rows.stop, start)
            if above > rows.start:
                found[: above - rows.start, place] = self.panels[number][rows.start : above, inside]
            first, last = max(rows.start, start), min(rows.stop, start + len(self.squares[number]))
            if first < last:
                own = self.squares[number][first - start : last - start, inside]
                found[first - rows.start : last - rows.start, place] = own
        return found

    def _pieces(self, columns: slice) -> list[tuple[int, slice, slice]]:
        """Panels that have some of the columns: number, columns in it, and where these are."""
        found = []
        for number in range(columns.start // PANEL, -(-columns.stop // PANEL)):
            start = number * PANEL
            first, last = max(columns.start, start), min(columns.stop, start + PANEL)
            place = slice(first - columns.start, last - columns.start)
            found.append((number, slice(first - start, last - start), place))
        return found


class _PanelSlopes(Slopes):
    """What columns before a panel give it is added as they change: their rows of the matrix are in
    one piece, and so are the panel's own from there on."""

    def __init__(self, hessian: PanelHessian, errors: Floats) -> None:
        super().__init__(hessian, errors)
        self._panels = hessian.panels
        self._before = np.zeros_like(errors)

    def of(self, columns: slice) -> Floats:
        """The slope of the next panel."""
        panel = self._panels[columns.start // PANEL]
        rest = multiply(self.errors[:, columns.start :], panel[columns.start :])
        return rest + self._before[:, columns]

    def change(self, columns: slice, change: Floats) -> None:
        """Add to the errors of a panel."""
        super().change(columns, change)
        panel = self._panels[columns.start // PANEL]
        changed = np.ascontiguousarray(self.errors[:, columns])
        self._before[:, columns.stop :] += multiply(changed, panel[columns.stop :].T)


def cut_panels(columns: int) -> list[slice]:
    """Slices of `PANEL` columns, the last one of the rest."""
    return [slice(i, min(i + PANEL, columns)) for i in range(0, columns, PANEL)]


def prepare_panels(read: ReadRows, columns: int, damping: float) -> PanelHessian:
    """`quantcli.statistics.hessian.prepare_hessian` of the matrix that ``read`` gives row by row.

    SourceError as there.
    """
    cuts = cut_panels(columns)
    panels: list[Floats] = [np.empty((0, 0), np.float32) for _ in cuts]

    def take(number: int) -> None:
        panels[number] = np.ascontiguousarray(read(cuts[number]).T, np.float32)

    run_tasks([partial(take, number) for number in range(len(cuts))])
    diagonal = np.concatenate(
        [panel[cut].diagonal() for panel, cut in zip(panels, cuts, strict=True)]
    ).astype(np.float64)
    alive, average = fill_dead(diagonal)
    while True:
        for panel, cut in zip(panels, cuts, strict=True):
            np.fill_diagonal(panel[cut], alive[cut] + damping * average)
        try:
            squares, pivots = _factor_in_place(panels, cuts)
            break
        except torch.linalg.LinAlgError:
            damping = raise_damping(damping)
            _restore(panels, cuts)
    return PanelHessian(panels, squares, pivots, damping)


@dataclass(frozen=True)
class _Work:
    """A factorisation under way: panels above their own rows, and the roots of these."""

    panels: Sequence[Floats]
    cuts: Sequence[slice]
    roots: list[Floats]

    def take_off(self, number: int, rows: slice) -> Floats:
        """Some rows of a panel, less what the panels after it stand for."""
        own = self.cuts[number]
        left = self.panels[number][rows].copy()
        for panel in self.panels[number + 1 :]:
            left -= multiply(panel[rows], panel[own].T)
        return left


def _factor_in_place(
    panels: Sequence[Floats], cuts: Sequence[slice]
) -> tuple[list[Floats], Floats]:
    """I + U over the panels' own rows, and D; above these rows I + U takes the matrix's place."""
    work = _Work(panels, cuts, [np.empty((0, 0), np.float32) for _ in cuts])

    def root(number: int) -> None:
        left = work.take_off(number, cuts[number])
        turned = torch.from_numpy(left[::-1, ::-1].copy())
        work.roots[number] = np.ascontiguousarray(torch.linalg.cholesky(turned).numpy()[::-1, ::-1])

    def solve(number: int, inverse: Floats, rows: slice) -> None:
        panels[number][rows] = multiply(work.take_off(number, rows), inverse)

    for number in reversed(range(len(cuts))):
        run_tasks([partial(root, number)])
        wide = work.roots[number].astype(np.float64)
        inverse = np.linalg.inv(wide).T.astype(np.float32)
        run_tasks(
            [
                partial(solve, number, np.ascontiguousarray(inverse), rows)
                for rows in shares(cuts[number].start, TILE)
            ]
        )

    def scale(number: int) -> None:
        panels[number][: cuts[number].start] /= work.roots[number].diagonal()

    run_tasks([partial(scale, number) for number in range(len(cuts))])
    diagonals = [own.diagonal() for own in work.roots]
    squares = [own / diagonal for own, diagonal in zip(work.roots, diagonals, strict=True)]
    pivots = np.concatenate(diagonals)
    return squares, pivots * pivots


def _restore(panels: Sequence[Floats], cuts: Sequence[slice]) -> None:
    """The matrix above the panels' own rows, from what is below these."""
    for number, own in enumerate(cuts):
        for panel, rows in zip(panels[:number], cuts[:number], strict=True):
            panels[number][rows] = panel[own].T
