"""The plan of a model folder that takes another folder's codes as they are.

Every linear layer that is stored as codes goes to the same grid of the other format: as many bits,
the same groups, or smaller ones with a scale repeated, and the zero points that it can say. Scales
and zero points are read to decide that; codes are not. Where a matrix has no such grid, one
sentence says why.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from quantcli.errors import PlanError
from quantcli.formats.float_grid import BLOCK, FloatGrid
from quantcli.formats.integer import IntegerGrid, Strategy
from quantcli.formats.regrid import UnfitError, convert_ranges, holds_all
from quantcli.layouts.base import CodeGrid, Grids, Layout, is_static
from quantcli.layouts.stored_codes import CodedStore, divisor
from quantcli.model import Model
from quantcli.plan.carried import CACHE, Carried, find_cache_scales, input_extremes
from quantcli.plan.folders import FolderPlan, Item, list_copies, model_dtype, mtp_notes
from quantcli.plan.linear_layers import find_matrices, kept_modules, router_names
from quantcli.plan.recipe import Recipe
from quantcli.plan.schemes import Scheme
from quantcli.types import Matrix, Note

_FLOATS = ("F64", "F32", "F16", "BF16")
_SIZES = (128, 64, 32, 16, 8)
_ROWS = 4096


@dataclass(frozen=True, slots=True)
class SameCodes:
    """The plan, each module's grid as it is stored, and whether all weights are bit for bit.

    ``carried`` are the scales of activations and caches that come along.
    """

    plan: FolderPlan
    grids: Mapping[str, CodeGrid]
    exact: bool
    carried: Carried = field(default_factory=Carried)


def plan_same_codes(
    model: Model, layout: Layout, recipe: Recipe, label: str, *, dtype: str | None = None,
    hint: str | None = None,
) -> SameCodes:  # fmt: skip
    """Decide a folder of ``layout`` with the codes of the checkpoint ``model``.

    ``label`` is what the user calls the model, ``dtype`` what its floats are in where the recipe
    says nothing, and ``hint`` what would do where this does not. PlanError where a matrix lies on
    no grid that the layout has, or on several and it has one for all.
    """
    fresh = hint or f"'quantcli quantize {label} --to {layout.name}' quantizes it"
    hint = hint or (
        f"'quantcli quantize {label} --to {layout.name}' rounds the weights a second time, as "
        "--requantize does; the original model is better"
    )
    store, dtype = model.store, recipe.dtype or dtype or model_dtype(model)
    if not isinstance(store, CodedStore):
        raise PlanError(f"{label} has no codes", hint=hint)
    found = find_matrices(model, embeddings=layout.embeddings, stacked=layout.stacked, packed=True)
    coded, kept = _part(model, found, store, layout, hint)
    if not coded:
        raise PlanError(
            f"{label} has no linear layer that is stored as codes of a grid",
            hint=fresh,
        )
    try:
        schemes, exact = _choose(model, coded, store, layout, dtype)
    except PlanError as refused:
        raise PlanError(refused.message, hint=refused.hint or hint) from None
    _refuse_several(layout, schemes, label, hint)
    for matrix in coded:
        scheme = schemes[_key(matrix)]
        odd = scheme.packing.refuse(matrix, scheme.grid)
        if odd is not None:
            raise PlanError(
                f"{_where(model, matrix)} ({matrix.rows} x {matrix.columns}) does not fit --to "
                f"{layout.name}: {odd}",
                hint=hint,
            )
    _check_stacks(found, schemes, hint)
    names = router_names(model)
    items = tuple(Item(matrix, scheme=schemes[_key(matrix)]) for matrix in coded)
    carried = _carry(model, store, layout, items)
    if carried.caches:
        recipe = replace(recipe, kv_cache=CACHE)
    copies, left = list_copies(model, items, recipe.dtype, dtype, kept, names)
    modules = kept_modules(model, coded, kept, names, head=not layout.embeddings)
    notes = [*left, *mtp_notes(model), *_notes(store, layout, items, dtype, exact, carried)]
    plan = FolderPlan(recipe, dtype, items, copies, modules, tuple(notes), carried.owners)
    grids = store.grids
    grids = {matrix.source: grids[matrix.source] for matrix in coded}
    return SameCodes(plan, grids, exact, carried)


def _carry(model: Model, store: CodedStore, layout: Layout, items: Sequence[Item]) -> Carried:
    """The scales beside weights that the chosen schemes and the layout have a place for."""
    found = find_cache_scales(model, store, layout)
    inputs, names = {}, set(found.names)
    for item in items:
        seen = None
        if item.scheme is not None and item.scheme.is_static:
            seen = input_extremes(store, item.matrix, store.grids[item.source])
        if seen is not None:
            name, inputs[item.matrix.module] = seen
            names.add(name)
    return replace(found, inputs=inputs, names=frozenset(names))


def _key(matrix: Matrix) -> tuple[str, int]:
    return matrix.source, matrix.first


def _part(
    model: Model, found: Sequence[Matrix], store: CodedStore, layout: Layout, hint: str
) -> tuple[list[Matrix], list[Matrix]]:
    """The matrices that are stored as codes, and those that are floats or become them.

    These are embeddings and heads, which need no codes, on a grid that the layout has not.
    """
    coded, kept, grids = [], [], store.grids
    inner = {matrix.source for matrix in find_matrices(model)}
    for matrix in found:
        info = model.store.tensors[matrix.source]
        outer = matrix.source not in inner
        if info.dtype in _FLOATS or (
            outer and (matrix.source not in grids or not _has(layout, grids[matrix.source]))
        ):
            kept.append(matrix)
        elif matrix.source not in grids:
            raise PlanError(
                f"{info.file}: {info.name} ({info.dtype}) lies on no grid whose codes --to "
                f"{layout.name} holds",
                hint=hint,
            )
        elif matrix.transpose:
            raise PlanError(
                f"{info.file}: {info.name} is stored transposed, which --to {layout.name} does "
                "not do",
                hint=hint,
            )
        else:
            coded.append(matrix)
    return coded, kept


def _choose(
    model: Model, coded: Sequence[Matrix], store: CodedStore, layout: Layout, dtype: str
) -> tuple[dict[tuple[str, int], Scheme], bool]:
    """Each matrix's scheme: of those that hold a family of matrices the first."""
    grids = store.grids
    blocks = any(grid.strategy == "block" for grid in grids.values())
    sizes = {(grid.bits, grid.group_size) for grid in grids.values()}
    families: defaultdict[tuple[Any, ...], list[Matrix]] = defaultdict(list)
    for matrix in coded:
        grid = grids[matrix.source]
        small = max(matrix.rows, matrix.columns) <= BLOCK
        if isinstance(grid, FloatGrid):
            span = "block" if blocks and small and grid.strategy == "tensor" else grid.strategy
            families[grid.kind, grid.scales, span, grid.group_size].append(matrix)
        else:
            if grid.strategy == "channel" and (grid.bits, matrix.columns) in sizes:
                # One group of the size that others have fills the row.
                grid = replace(grid, strategy="group", group_size=matrix.columns)
            families[grid.bits, *_span(layout, grid, matrix), grid.ordered].append(matrix)
    chosen: dict[tuple[str, int], Scheme] = {}
    exact = True
    for family, matrices in families.items():
        first = grids[matrices[0].source]
        if isinstance(first, FloatGrid):
            wanted = replace(first, strategy=family[2])
            told = layout.inputs is not None and all(
                input_extremes(store, matrix, grids[matrix.source]) for matrix in matrices
            )
            candidates = _float_schemes(layout, wanted, static=True) if told else []
            candidates = candidates or _float_schemes(layout, wanted)
        else:
            candidates = _integer_schemes(layout, first, (family[1], family[2]), dtype)
        if not candidates:
            kind = model.store.tensors[matrices[0].source].dtype
            raise PlanError(
                f"{_where(model, matrices[0])} is {kind}, whose grid ({_grid_text(first)}) --to "
                f"{layout.name} does not have"
            )
        for matrix in matrices:
            candidates, same = _narrow(model, store, matrix, candidates)
            exact &= same
        chosen |= {_key(matrix): candidates[0] for matrix in matrices}
    return chosen, exact


def _has(layout: Layout, grid: CodeGrid) -> bool:
    """Whether a layout has a grid of such codes."""
    if isinstance(grid, FloatGrid):
        return bool(_float_schemes(layout, grid))
    return layout.grids is not None and grid.bits in layout.grids.bits


def _where(model: Model, matrix: Matrix) -> str:
    info = model.store.tensors[matrix.source]
    return f"{info.file}: {info.name}"


def _grid_text(grid: CodeGrid) -> str:
    return grid.label + ("" if grid.symmetric else " with zero points")


def _narrow(
    model: Model, store: CodedStore, matrix: Matrix, candidates: list[Scheme]
) -> tuple[list[Scheme], bool]:
    """Those of the candidates that hold a matrix's scales and zero points; PlanError for none.

    They are not read where the first holds whatever there is.
    """
    grid = store.grids[matrix.source]
    stored, multiplies = store.read_whole(matrix.source)
    whole = divisor(stored, multiplies)
    if holds_all(grid, candidates[0].grid):
        return candidates, not multiplies
    reasons: list[tuple[bool, str]] = []
    for start in range(0, matrix.rows, _ROWS):
        first = matrix.first + start
        stop = min(first + _ROWS, matrix.first + matrix.rows)
        scales, zeros = store.read_ranges(matrix.source, first, stop)
        left = []
        for scheme in candidates:
            target = scheme.grid
            if isinstance(target, FloatGrid) and target.needs_whole and whole is not None:
                target = target.with_whole(whole)
            try:
                convert_ranges(scales, zeros, grid, target, matrix.columns)
            except UnfitError as unfit:
                reasons.append((scheme.grid.symmetric, str(unfit)))
            else:
                left.append(scheme)
        candidates = left
        if not candidates:
            raise PlanError(
                f"{_where(model, matrix)} ({_grid_text(grid)}) does not fit bit for bit: "
                f"{_reason(reasons)}"
            )
    return candidates, not multiplies


def _reason(reasons: Sequence[tuple[bool, str]]) -> str:
    """The reason that says most: of grids with zero points of their own, and not of dtypes."""
    least = min(symmetric for symmetric, _ in reasons)
    last = [reason for symmetric, reason in reasons if symmetric == least]
    return next((reason for reason in last if "does not hold the scale" not in reason), last[0])


def _span(layout: Layout, grid: IntegerGrid, matrix: Matrix) -> tuple[Strategy, int | None]:
    """What shares a scale there: as here, or the largest part of it that the layout has."""
    grids = layout.grids
    if grids is None:
        return grid.strategy, grid.group_size
    if grid.strategy == "group" and grid.group_size and grids.has_group(grid.group_size):
        return "group", grid.group_size
    for strategy in ("tensor", "channel"):
        wider = strategy == "tensor" and grid.strategy != "tensor"
        if strategy in grids.strategies and grid.strategy != "group" and not wider:
            return strategy, None
    size = grid.group_size or matrix.columns
    if grids.has_group(size):
        return "group", size
    sizes = sorted(grids.groups or _SIZES, reverse=True)
    return "group", next((s for s in sizes if size % s == 0 and grids.has_group(s)), size)


def _integer_schemes(
    layout: Layout, grid: IntegerGrid, span: tuple[Strategy, int | None], dtype: str
) -> list[Scheme]:
    """Schemes with these codes, the usual ones first: without zero points, scales as usual."""
    grids = layout.grids
    if grids is None or grid.bits not in grids.bits or (grid.ordered and not grids.ordered):
        return []
    strategy, size = span
    if grid.ordered and span != (grid.strategy, grid.group_size):
        return []
    if strategy == "group" and (size is None or not grids.has_group(size)):
        return []
    halves = ("F16", "BF16")
    dtypes = dict.fromkeys(
        (grids.scale_dtype, *halves)
        if grids.scale_dtype is not None
        else (dtype, *(kind for kind in halves if dtype != "F32"), "F32")
    )
    return [
        _integer_scheme(
            layout,
            grids,
            IntegerGrid(grid.bits, zero, strategy, size, kind, ordered=grid.ordered),
        )
        for zero in (grids.symmetric, grids.asymmetric)
        if zero is not None
        for kind in dtypes
        if kind is not None
    ]


def _integer_scheme(layout: Layout, grids: Grids, grid: IntegerGrid) -> Scheme:
    if grid.zero == "integer":
        grid = replace(grid, lowest_zero=grids.lowest_zero)
    kind = "" if grid.symmetric or grids.symmetric is None else " asymmetric"
    return Scheme(layout, grid.label + kind, grid, grids.packing, "minmax", weighted=False)


def _float_schemes(layout: Layout, grid: FloatGrid, *, static: bool = False) -> list[Scheme]:
    """Schemes with these codes, those that leave activations alone first.

    Only those that have ``static`` scales of activations, or only the others.
    """
    presets = [
        preset
        for preset in layout.presets.values()
        if _spans(preset.grid, grid) and is_static(preset.inputs) == static
    ]
    found = []
    for preset in sorted(presets, key=lambda preset: preset.inputs is not None):
        target = preset.grid
        if not isinstance(target, FloatGrid):
            continue
        kinds = (target.scale_dtype,) if target.scale_dtype else (grid.scale_dtype, "F32")
        found += [
            Scheme(
                layout, preset.name, replace(target, scale_dtype=kind), preset.packing, "minmax",
                weighted=False, inputs=preset.inputs,
            )
            for kind in dict.fromkeys(kinds)
        ]  # fmt: skip
    return found


def _spans(target: CodeGrid, grid: FloatGrid) -> bool:
    """Whether a grid of floats has these codes, and scales at least as close together."""
    if not isinstance(target, FloatGrid):
        return False
    if (target.kind, target.scales) != (grid.kind, grid.scales):
        return False
    if target.group_size != grid.group_size:
        return False
    return target.strategy == grid.strategy or grid.strategy == "tensor"


def _refuse_several(
    layout: Layout, schemes: Mapping[tuple[str, int], Scheme], label: str, hint: str
) -> None:
    kinds = Counter(scheme.label for scheme in schemes.values())
    if len(kinds) > 1 and not layout.mixed:
        raise PlanError(
            f"{label} has linear layers in {' and '.join(kinds)}, and --to {layout.name} takes one "
            "grid for all",
            hint=hint,
        )


def _check_stacks(
    found: Sequence[Matrix], schemes: Mapping[tuple[str, int], Scheme], hint: str
) -> None:
    """PlanError where matrices of one stack have several grids, or some of them none."""
    kinds: dict[str, set[str]] = {}
    for matrix in found:
        if matrix.stack:
            scheme = schemes.get(_key(matrix))
            kinds.setdefault(matrix.module, set()).add(scheme.label if scheme else "floats")
    for module, labels in kinds.items():
        if len(labels) > 1:
            raise PlanError(
                f"the experts of {module}, which are one tensor there, are {' and '.join(labels)}",
                hint=hint,
            )


def _notes(
    store: CodedStore, layout: Layout, items: Sequence[Item], dtype: str, exact: bool,
    carried: Carried,
) -> list[Note]:  # fmt: skip
    notes = []
    for scheme in {item.scheme.label: item.scheme for item in items if item.scheme}.values():
        own = [item.matrix for item in items if item.scheme is scheme]
        usual = (layout.grids.scale_dtype if layout.grids else None) or dtype
        if isinstance(scheme.grid, IntegerGrid) and scheme.grid.scale_dtype != usual:
            notes.append(
                Note(
                    f"scales are {scheme.grid.scale_dtype}, since {usual} does not hold them; a "
                    f"runtime that computes in {usual} rounds them"
                )
            )
        sizes = {_size(store.grids[m.source], m) for m in own}
        if scheme.grid.group_size and sizes != {scheme.grid.group_size}:
            notes.append(
                Note(
                    f"scales are repeated for groups of {scheme.grid.group_size}, since --to "
                    f"{layout.name} has none of {', '.join(map(str, sorted(sizes)))}"
                )
            )
        notes += layout.remark(scheme.grid, own)
    if carried.names:
        notes.append(
            Note(
                f"{len(carried.names)} scales of activations or caches go along, such as "
                f"{min(carried.names)}"
            )
        )
    left = [name for name in store.passed_over if name not in carried.names]
    if left:
        notes.append(
            Note(
                f"{len(left)} stored scales of activations or caches are left out, which a runtime "
                f"finds as it runs: {left[0]}",
                "warning",
            )
        )
    if not exact:
        notes.append(
            Note(
                "the scales of whole matrices are stored as their reciprocals, so decoded weights "
                "may differ in float32's last bit; codes and scales of groups are the same bytes"
            )
        )
    return notes


def _size(grid: CodeGrid, matrix: Matrix) -> int:
    return grid.group_size or (BLOCK if grid.strategy == "block" else matrix.columns)


def equal_weights(found: np.ndarray, wanted: np.ndarray, *, exact: bool) -> np.ndarray:
    """Where weights are the same, or, unless ``exact``, within two units of the last place."""
    if exact:
        return np.asarray(found == wanted)
    # What is no finite number is near nothing.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.abs(found - wanted) <= np.float32(2.0**-22) * np.abs(wanted))
