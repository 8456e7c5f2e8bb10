"""Matrices that their scheme does not hold: rows that a group does not divide, and odd sides.

They are kept as they are, or get the nearest smaller group that the format has and that divides
their rows (``--on-fallback``). What servers run as one matrix has one group and is kept together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from quantcli.errors import PlanError
from quantcli.formats.integer import IntegerGrid
from quantcli.model import Model
from quantcli.plan.fused import group_modules
from quantcli.plan.schemes import Scheme
from quantcli.types import Matrix, Note

_SIZES = (128, 64, 32, 16, 8)
"""Groups that runtimes know, of a format that has any."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """Each module's scheme, the matrices that none holds, and what the user should know."""

    schemes: Mapping[str, Scheme]
    misfits: Sequence[Matrix]
    notes: tuple[Note, ...] = ()


def fit_matrices(
    model: Model, found: Sequence[Matrix], schemes: Mapping[str, Scheme], on_fallback: str
) -> Fitted:
    """Decide what becomes of those of ``found`` that their scheme does not hold.

    ``on_fallback`` is "warn", "nearest" or "error". PlanError for a matrix that is stored
    transposed, where nothing else is left, and for the first misfit where it is an "error".
    """
    turned = next((matrix for matrix in found if matrix.transpose), None)
    if turned is not None:
        info = model.store.tensors[turned.source]
        raise PlanError(
            f"{info.file}: {info.name} is stored transposed, which --to "
            f"{schemes[turned.module].layout.name} does not do",
            hint="--to hf or a GGUF",
        )
    wanted = schemes
    if on_fallback == "nearest":
        schemes = _regroup(found, schemes)
    misfits = [matrix for matrix in found if why_unfit(matrix, schemes[matrix.module])]
    if misfits and (on_fallback == "error" or len(misfits) == len(found)):
        raise _refusal(model, misfits[0], schemes[misfits[0].module], found)
    notes = [*_regrouped_note(found, wanted, schemes)]
    if misfits:
        notes.append(_kept_note(misfits, found, schemes))
    return Fitted(schemes, misfits, tuple(notes))


def why_unfit(matrix: Matrix, scheme: Scheme) -> str | None:
    """Why a scheme does not hold a matrix; None where it does."""
    size = scheme.grid.group_size
    if size is not None and matrix.columns % size:
        return f"groups of {size} do not divide {matrix.columns} columns"
    return scheme.packing.refuse(matrix, scheme.grid)


def _sizes(scheme: Scheme) -> tuple[int, ...]:
    return tuple(sorted(scheme.groups or _SIZES, reverse=True))


def _nearest(scheme: Scheme, shared: int) -> Scheme:
    """The scheme with the largest group below its own that divides ``shared`` columns, or rows."""
    grid = scheme.grid
    size = grid.group_size
    if size is None or shared % size == 0 or not isinstance(grid, IntegerGrid):
        return scheme
    smaller = next((g for g in _sizes(scheme) if g < size and shared % g == 0), None)
    if smaller is not None:
        changed = replace(grid, group_size=smaller)
    elif "channel" in scheme.strategies:
        changed = replace(grid, strategy="channel", group_size=None)
    else:
        return scheme
    label = scheme.label.replace(grid.label, changed.label, 1)
    return replace(scheme, grid=changed, label=label)


def _regroup(found: Sequence[Matrix], schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """Smaller groups where they are needed; for all modules of a format that has one grid."""
    columns: dict[str, list[int]] = {}
    for matrix in found:
        columns.setdefault(matrix.module, []).append(matrix.columns)
    every = math.gcd(*(size for sizes in columns.values() for size in sizes))
    shared = dict.fromkeys(columns, every)
    for together in group_modules(columns):
        if schemes[together[0]].layout.mixed:
            own = math.gcd(*(size for part in together for size in columns[part]))
            shared |= dict.fromkeys(together, own)
    return {
        module: _nearest(scheme, shared[module]) if module in shared else scheme
        for module, scheme in schemes.items()
    }


def _regrouped_note(
    found: Sequence[Matrix], wanted: Mapping[str, Scheme], schemes: Mapping[str, Scheme]
) -> list[Note]:
    modules = [m.module for m in found if wanted[m.module].grid != schemes[m.module].grid]
    if not modules:
        return []
    labels = dict.fromkeys(schemes[module].label for module in modules)
    return [
        Note(
            f"{len(modules)} matrices become {' and '.join(labels)}, since groups of "
            f"{wanted[modules[0]].grid.group_size} do not divide the rows of all: "
            f"{shown(modules)}",
            "warning",
        )
    ]


def _kept_note(
    misfits: Sequence[Matrix], found: Sequence[Matrix], schemes: Mapping[str, Scheme]
) -> Note:
    share = sum(m.elements for m in misfits) / sum(m.elements for m in found)
    first = misfits[0]
    scheme = schemes[first.module]
    size = scheme.grid.group_size
    hint = ""
    if size is not None and first.columns % size and _nearest(scheme, first.columns) != scheme:
        hint = "; --on-fallback nearest gives them smaller groups"
    return Note(
        f"{len(misfits)} of {len(found)} matrices, {100 * share:.2g} % of the linear weights, do "
        f"not fit --to {scheme.layout.name} and are kept as they are ({why_unfit(first, scheme)}): "
        f"{shown([m.module for m in misfits])}{hint}",
        "warning",
    )


def _refusal(model: Model, matrix: Matrix, scheme: Scheme, found: Sequence[Matrix]) -> PlanError:
    info = model.store.tensors[matrix.source]
    alike = re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(matrix.module))
    keep = f"--keep '{alike}' leaves these matrices as they are"
    size = scheme.grid.group_size
    if size is None or matrix.columns % size == 0:
        reason = scheme.packing.refuse(matrix, scheme.grid)
        return PlanError(
            f"{info.file}: {info.name} ({matrix.rows} x {matrix.columns}) does not fit --to "
            f"{scheme.layout.name}: {reason}",
            hint=keep,
        )
    shared = math.gcd(*(matrix.columns for matrix in found))
    fits = next((g for g in _sizes(scheme) if shared % g == 0), None)
    hint = f"--group-size {fits} does, or " if fits else ""
    return PlanError(
        f"{info.file}: groups of {size} do not divide the {matrix.columns} columns of {info.name}",
        hint=hint + keep,
    )


def shown(names: Sequence[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def widen(modules: Set[str], found: Iterable[Matrix]) -> list[str]:
    """Modules that need the scheme of one of ``modules`` and are none of them, in order."""
    groups = group_modules(matrix.module for matrix in found)
    return [
        module
        for group in groups
        if not modules.isdisjoint(group)
        for module in group
        if module not in modules
    ]
