"""The schemes that modules of a model folder may be given, and the bytes of each.

Modules that servers run as one matrix have one scheme: q, k and v, gate and up, and all experts of
a block. `KEPT` leaves modules as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from quantcli.errors import PlanError, UsageError
from quantcli.model import Model
from quantcli.plan.allocate import Choice
from quantcli.plan.folders import FolderPlan, Item, float_of
from quantcli.plan.fused import scheme_groups
from quantcli.plan.misfits import why_unfit
from quantcli.plan.recipe import KEPT
from quantcli.plan.schemes import INTEGERS, Scheme, find_scheme, scheme_title, split_scheme
from quantcli.types import Matrix

_FAMILIES = (
    ("NVFP4A16", "FP8_DYNAMIC"),
    ("NVFP4A16", "FP8_BLOCK"),
    ("MXFP4A16", "MXFP8A16"),
    ("MXFP4", "MXFP8"),
    ("MXFP4XFP8", "FP8_BLOCK"),
    ("NVFP4", "FP8_DYNAMIC"),
    ("NVFP4", "MXFP8"),
    ("W4A8", "W8A8"),
    ("W4AFP8", "FP8_DYNAMIC"),
)
"""Schemes that go together, besides integers for float activations: a small and a large one."""
_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (64, 32)
_FEW = 2
_SIZES = {"F32": 4}
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.")


@dataclass(frozen=True)
class SchemeChoices:
    """``choices`` between ``schemes``, by their names; ``patterns`` find a choice's modules."""

    choices: tuple[Choice, ...]
    schemes: dict[str, Scheme]
    patterns: dict[str, str]

    def entries(self, kinds: dict[str, str]) -> list[str]:
        """The recipe's ``scheme`` for chosen ``kinds``; what is kept has none."""
        return [f"{self.patterns[n]}={kind}" for n, kind in kinds.items() if kind != KEPT]


def find_scheme_choices(
    model: Model, plan: FolderPlan, wanted: Sequence[str] = (), *, has_importance: bool
) -> SchemeChoices:
    """For modules that are run as one, the schemes ``wanted``, or those that go with their own.

    Modules whose scheme the recipe asks for by a pattern have no choice. UsageError or PlanError
    for a scheme that cannot be chosen.
    """
    recipe = plan.recipe
    patterns = [pattern for pattern, _ in map(split_scheme, recipe.scheme) if pattern is not None]
    items = [
        item
        for item in plan.items
        if item.scheme and not any(re.search(p, item.matrix.module) for p in patterns)
    ]
    if not items or items[0].scheme is None:
        raise PlanError(
            f"{plan.label} quantizes nothing whose scheme could be chosen",
            hint="leave out --allocate, or --scheme with a pattern",
        )
    usual = items[0].scheme
    own = scheme_title(usual)
    if own is None:
        raise UsageError(
            f"--allocate is not for {usual.label}", hint="it is for schemes that have a name"
        )
    names = list(dict.fromkeys(wanted)) or [own, *list_schemes(usual, own), KEPT]
    schemes = {
        scheme_title(scheme) or scheme.label: scheme
        for name in names
        if name != KEPT
        for scheme in [find_scheme(recipe, usual.layout, name, plan.dtype, has_importance)]
    }
    choices, found = [], {}
    for group in _group(items, fuses=usual.layout.fuses):
        modules = list(dict.fromkeys(item.matrix.module for item in group))
        sizes = {
            kind: sum(_size(item.matrix, scheme) for item in group)
            for kind, scheme in (schemes or {own: usual}).items()
            if not any(why_unfit(item.matrix, scheme) for item in group)
        } or {own: sum(_size(item.matrix, usual) for item in group)}
        if KEPT in names:
            sizes[KEPT] = sum(_kept_size(model, plan, item.matrix) for item in group)
        tensors = tuple(dict.fromkeys(item.matrix.tensor for item in group))
        start = own if own in sizes else next(iter(sizes))
        choices.append(Choice(modules[0], start, sizes, tensors, lossless=KEPT))
        found[modules[0]] = _pattern(modules)
    return SchemeChoices(tuple(choices), {own: usual} | schemes, found)


def list_schemes(usual: Scheme, own: str) -> list[str]:
    """The schemes of the family of a folder's own that its servers run.

    Of integers for float activations other widths; where there are few of them other groups.
    """
    layout, found = usual.layout, INTEGERS.fullmatch(own)
    if found is None or usual.inputs is not None or layout.grids is None:
        family = next(
            (f for f in _FAMILIES if own in f and all(name in layout.presets for name in f)), ()
        )
        return list(family)
    bits, group, zero = found.groups()
    end = "" if zero is None else f"_{zero}"
    served = layout.served or layout.grids.bits
    widths = [width for width in _BITS if width in served]
    names = [f"W{width}A16{f'_{group}' if group else ''}{end}" for width in widths]
    if len(widths) <= _FEW:
        names += [f"W{bits}A16_G{size}{end}" for size in _GROUPS if layout.grids.has_group(size)]
        # Feedback does less for a scale that is found before it, so only where it saves bytes.
        names += [f"W{bits}A16_CHANNEL{end}"] if "channel" in layout.grids.strategies else []
    return names


def _group(items: Sequence[Item], *, fuses: bool) -> list[list[Item]]:
    """Items that have one scheme: those that are run as one, and parts of one GGUF tensor."""
    together = scheme_groups(item.matrix.module for item in items) if fuses else {}
    groups: list[list[Item]] = []
    known: dict[str, int] = {}
    for item in items:
        first = together.get(item.matrix.module, (item.matrix.module,))[0]
        keys = (f"module {first}", f"tensor {item.matrix.tensor}")
        met = sorted({known[key] for key in keys if key in known})
        place = met[0] if met else len(groups)
        if not met:
            groups.append([])
        groups[place].append(item)
        for other in met[1:]:
            groups[place] += groups[other]
            groups[other] = []
            known.update({key: place for key, at in known.items() if at == other})
        known.update(dict.fromkeys(keys, place))
    return [group for group in groups if group]


def _size(matrix: Matrix, scheme: Scheme) -> int:
    declared = scheme.packing.declare(matrix, scheme.grid)
    return sum(tensor.nbytes for tensor in declared) // max(1, matrix.stack)


def _kept_size(model: Model, plan: FolderPlan, matrix: Matrix) -> int:
    stored = model.store.tensors[matrix.source].dtype
    dtype = plan.recipe.dtype or float_of(stored, plan.dtype)
    return matrix.elements * _SIZES.get(dtype, 2)


def _pattern(modules: Sequence[str]) -> str:
    """An expression that finds these modules alone."""
    experts = {found[1] for module in modules if (found := _EXPERT.match(module))}
    if experts:
        return "|".join(rf"^{re.escape(block)}\." for block in sorted(experts))
    blocks: dict[str, list[str]] = {}
    for module in modules:
        block, _, leaf = module.rpartition(".")
        blocks.setdefault(block, []).append(re.escape(leaf))
    parts = []
    for block, leaves in blocks.items():
        inner = leaves[0] if len(leaves) == 1 else f"({'|'.join(leaves)})"
        parts.append(rf"^{re.escape(block)}\.{inner}$" if block else f"^{inner}$")
    return "|".join(parts)
