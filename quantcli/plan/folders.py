"""The plan of a model folder: which of a checkpoint's tensors are quantized, and which are copied.

The tensors keep their names and row order. For the integer formats the linear layers are quantized
and the rest is copied; for ``hf`` each matrix takes the way through the block format that the GGUF
planner gives to the GGUF tensor of the same weights, and back. Only headers are looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from quantcli.archs import find_architecture
from quantcli.archs.config import class_name
from quantcli.errors import PlanError
from quantcli.formats import get_format
from quantcli.formats.regrid import is_same_grid
from quantcli.layouts import find_layout
from quantcli.layouts.base import Layout
from quantcli.layouts.stored_codes import CodedStore
from quantcli.model import Model
from quantcli.plan.caches import CacheOwner, find_caches
from quantcli.plan.fused import group_modules, scheme_groups
from quantcli.plan.importance import Shapes, applies, refuse_foreign, select_entries
from quantcli.plan.linear_layers import (
    find_matrices,
    kept_modules,
    natural,
    router_names,
    whole_stacks,
)
from quantcli.plan.misfits import fit_matrices, shown, widen
from quantcli.plan.planner import Plan, make_plan
from quantcli.plan.recipe import Recipe
from quantcli.plan.recipe_check import check_recipe
from quantcli.plan.schemes import (
    DTYPES,
    UNQUANTIZED,
    Scheme,
    SchemeRule,
    has_types,
    make_schemes,
)
from quantcli.types import Matrix, Note, row_count

_FLOATS = {"F64": "F32", "F32": "F32", "F16": "F16", "BF16": "BF16"}
"""Stored floats, and what they are written as; quantized weights take the model's dtype."""


@dataclass(frozen=True, slots=True)
class Item:
    """A matrix that is quantized: by a scheme's grid, or by a block format and back.

    ``dtype`` is what a block format's weights are decoded to; ``importance`` tells that the
    importance matrix has weights for it.
    """

    matrix: Matrix
    format: str | None = None
    dtype: str = ""
    importance: bool = False
    scheme: Scheme | None = None

    @property
    def source(self) -> str:
        """The stored tensor."""
        return self.matrix.source

    @property
    def first(self) -> int:
        """Its first row there."""
        return self.matrix.first

    @property
    def rows(self) -> int:
        """Rows, as they are quantized."""
        return self.matrix.rows

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.matrix.columns


@dataclass(frozen=True, slots=True)
class Copy:
    """Rows of a stored tensor that are copied, in the dtype ``dtype``; otherwise as `Item`.

    They become ``name`` of shape ``shape``, from its row ``row`` on.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: int
    first: int = 0
    row: int = 0

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True)
class FolderPlan:
    """Every decision about a model folder; ``kept`` are linear modules that stay as they are.

    ``caches`` are the attention modules that have scales of a key-value cache beside them.
    """

    recipe: Recipe
    dtype: str
    items: tuple[Item, ...]
    copies: tuple[Copy, ...]
    kept: tuple[str, ...]
    notes: tuple[Note, ...] = ()
    caches: tuple[CacheOwner, ...] = ()

    @property
    def label(self) -> str:
        """What the quantized matrices become."""
        if not self.schemes:
            return self.recipe.type if has_types(self.recipe.to) else UNQUANTIZED.lower()
        return " and ".join(scheme.label for scheme in self.schemes)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Those of the quantized matrices, each once; none where they have block formats."""
        return tuple({s.label: s for item in self.items if (s := item.scheme)}.values())

    @property
    def static_items(self) -> tuple[Item, ...]:
        """Matrices whose activations have scales that are found beforehand."""
        return tuple(item for item in self.items if item.scheme and item.scheme.is_static)

    @property
    def needs_text(self) -> bool:
        """Whether some scales are found by running the model on texts."""
        return bool(self.static_items or self.caches)

    @property
    def elements(self) -> int:
        """Weights of the model."""
        parts: list[Item | Copy] = [*self.items, *self.copies]
        return sum(part.rows * part.columns for part in parts)


def make_folder_plan(model: Model, recipe: Recipe, *, importance: Shapes | None) -> FolderPlan:
    """Decide everything about a model folder; UsageError or PlanError in one sentence.

    ``importance`` maps the names in the recipe's importance matrix to (matrices, columns).
    """
    if model.from_gguf:
        raise PlanError(
            f"{model.path} is a GGUF, and --to {recipe.to} takes a checkpoint",
            hint="'quantcli export' makes a checkpoint of a GGUF",
        )
    check_recipe(recipe)
    dtype = recipe.dtype or model_dtype(model)
    make = _plan_types if has_types(recipe.to) else _plan_grid
    plan = make(model, recipe, dtype, importance)
    if model.untabled is None:
        return plan
    return replace(plan, notes=(Note(model.untabled.remark), *plan.notes))


def model_dtype(model: Model) -> str:
    """The dtype that config.json gives the model, or that of its largest stored tensor."""
    text_config = model.config.get("text_config")
    for config in (model.config, text_config if isinstance(text_config, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            for ours, theirs in DTYPES.items():
                if config.get(key) == theirs:
                    return ours
    largest = max(model.store.tensors.values(), key=lambda info: info.elements)
    return _FLOATS.get(largest.dtype, "BF16")


def _plan_grid(model: Model, recipe: Recipe, dtype: str, importance: Shapes | None) -> FolderPlan:
    rules = make_schemes(recipe, dtype, has_importance=importance is not None)
    layout = find_layout(recipe.to)
    found = find_matrices(model, embeddings=layout.embeddings, stacked=layout.stacked, packed=True)
    schemes, split = _assign(found, rules, layout)
    matched = {matrix.module for matrix in found if matrix.module not in schemes}
    matched |= _named(found, recipe.keep)
    beside = widen(matched, found) if layout.fuses else []
    if recipe.strict and (beside or split):
        raise _split(found, matched, beside, split)
    kept_ones = matched | set(beside)
    fitted = fit_matrices(
        model, [m for m in found if m.module not in kept_ones], schemes, recipe.on_fallback
    )
    schemes = {**schemes, **fitted.schemes}
    odd = {matrix.module for matrix in fitted.misfits}
    with_odd = widen(odd, [m for m in found if m.module not in kept_ones]) if layout.fuses else []
    kept_ones |= odd | set(with_odd)
    matrices = [matrix for matrix in found if matrix.module not in kept_ones]
    dropped = [matrix for matrix in found if matrix.module in kept_ones]
    names = router_names(model)
    used = _entries(model, recipe, importance)
    items = tuple(
        Item(matrix, importance=matrix.tensor in used, scheme=schemes[matrix.module])
        for matrix in matrices
    )
    notes = _again_notes(model, matrices, schemes)
    if model.untabled is not None and model.untabled.apart and not layout.stacked:
        notes.append(
            Note(
                "experts that are stored in one tensor become a module each, such as "
                f"{model.untabled.apart}, by the names that vLLM reads; transformers reads them in "
                "families only that are also published so",
                "warning",
            )
        )
    if whole := whole_stacks(model):
        notes.append(
            Note(
                f"{len(whole)} stacks of experts are kept as they are, because this model is "
                f"published with all experts in one tensor, which --to {layout.name} cannot "
                f"quantize: {whole[0]}" + (" ..." if len(whole) > 1 else ""),
                "warning",
            )
        )
    notes += fitted.notes
    for widened, because in ((beside, "those that --keep names"), (with_odd, "these")):
        if widened:
            notes.append(
                Note(
                    f"{len(widened)} more matrices are kept as they are, because vLLM and SGLang "
                    f"run them as one with {because}: {shown(widened)}",
                    "warning",
                )
            )
    if split:
        notes.append(
            Note(
                f"{len(split)} modules have the scheme of what vLLM and SGLang run with them as "
                f"one: {shown(split)}",
                "warning",
            )
        )
    for scheme in {item.scheme.label: item.scheme for item in items if item.scheme}.values():
        own = [item.matrix for item in items if item.scheme is scheme]
        notes += layout.remark(scheme.grid, own)
    if model.untabled is None and not find_architecture(model.config).loads_packed:
        notes.append(
            Note(
                f"transformers cannot load {class_name(model.config)} with packed weights, for "
                "which its code is not made; --to hf makes what it loads",
                "warning",
                "transformers",
            )
        )
    lacking = sum(not item.importance for item in items)
    if importance is not None and lacking:
        notes.append(
            Note(f"the importance matrix has nothing for {lacking} of {len(items)} matrices")
        )
    notes += mtp_notes(model)
    refused = next((note for note in notes if note.refused_by), None)
    if recipe.strict and refused is not None:
        raise PlanError(refused.message, hint="without --strict this is a remark")
    if not items:
        # Nothing is quantized, so everything keeps its place and name.
        dropped, names = [], {}
    copies, dropped_notes = list_copies(model, items, recipe.dtype, dtype, dropped, names)
    kept = kept_modules(model, matrices, dropped, names, head=not layout.embeddings)
    caches = () if recipe.kv_cache is None else find_caches(model)
    return FolderPlan(recipe, dtype, items, copies, kept, (*notes, *dropped_notes), caches)


def _plan_types(model: Model, recipe: Recipe, dtype: str, importance: Shapes | None) -> FolderPlan:
    plan = make_plan(model.tensors, model.metadata, recipe, importance=importance)
    plain = _FLOATS.get(recipe.type)
    wanted = recipe.dtype or plain
    stored = model.store.tensors
    items = tuple(
        Item(matrix, format_name, wanted or float_of(stored[matrix.source].dtype, dtype), weighted)
        for matrix, format_name, weighted in _coded(model, plan)
    )
    copies, notes = list_copies(model, items, wanted, dtype)
    notes = (*plan.notes, *mtp_notes(model), *notes)
    return FolderPlan(recipe, wanted or dtype, items, copies, (), notes)


def mtp_notes(model: Model) -> list[Note]:
    """A note if there are blocks for multi-token prediction, which are copied."""
    if not model.mtp_tensors:
        return []
    return [
        Note(
            f"the {len(model.mtp_tensors)} tensors of multi-token prediction are copied as they "
            "are stored; --no-mtp leaves them out"
        )
    ]


def _coded(model: Model, plan: Plan) -> list[tuple[Matrix, str, bool]]:
    """The matrices whose GGUF tensor gets a format that rounds."""
    formats = {item.tensor.name: item for item in plan.items}
    found = []
    for matrix in find_matrices(model, embeddings=True):
        item = formats[matrix.tensor]
        stored = model.store.tensors[matrix.source].dtype
        if get_format(item.format).block > 1 or item.format not in ("F32", stored):
            found.append((matrix, item.format, item.importance))
    return found


def _assign(
    found: Sequence[Matrix], rules: Sequence[SchemeRule], layout: Layout
) -> tuple[dict[str, Scheme], list[str]]:
    """Each module's scheme, and modules that have it for the sake of those they are run with."""
    schemes: dict[str, Scheme] = {}
    order: dict[str, int] = {}
    # Chosen schemes may have more patterns than Python keeps compiled.
    patterns = [re.compile(rule.pattern or "") for rule in rules]
    for rule, pattern in zip(rules, patterns, strict=True):
        if rule.pattern and not any(pattern.search(matrix.module) for matrix in found):
            raise PlanError(
                f"--scheme {rule.pattern}={rule.label} matches no linear module",
                hint=f"they are named like {found[0].module}" if found else None,
            )
    for matrix in found:
        for index, (rule, pattern) in enumerate(zip(rules, patterns, strict=True)):
            if pattern.search(matrix.module):
                order[matrix.module] = index
                if rule.scheme is not None:
                    schemes[matrix.module] = rule.scheme
                break
    split = []
    groups = group_modules(matrix.module for matrix in found) if layout.fuses else []
    for together in groups:
        parts = [part for part in together if part in order]
        if not parts:
            continue
        shared = rules[min(order[part] for part in parts)].scheme
        for module in together:
            if schemes.get(module) is shared:
                continue
            split.append(module)
            if shared is None:
                del schemes[module]
            else:
                schemes[module] = shared
    return schemes, split


def _again_notes(
    model: Model, matrices: Sequence[Matrix], schemes: Mapping[str, Scheme]
) -> list[Note]:
    """A warning for each storage that is rounded again, with the way round it where it has none."""
    grids = model.store.grids if isinstance(model.store, CodedStore) else {}
    stored: defaultdict[str, list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        stored[model.store.tensors[matrix.source].dtype].append(matrix)
    notes = []
    for dtype, own in stored.items():
        if dtype in _FLOATS:
            continue
        better = "the original model gives a better result"
        layout = schemes[own[0].module].layout
        if all(
            m.source in grids and is_same_grid(grids[m.source], schemes[m.module].grid, m.columns)
            for m in own
        ):
            better += (
                f", and 'quantcli export {model.label} --to {layout.name}' keeps the codes, which "
                "are on such a grid already"
            )
        notes.append(
            Note(
                f"{len(own)} matrices are stored as {dtype} and are rounded a second time; "
                f"{better}",
                "warning",
            )
        )
    return notes


def _named(found: Sequence[Matrix], patterns: Sequence[str]) -> set[str]:
    """The modules that ``patterns`` match; PlanError for one that matches none."""
    for pattern in patterns:
        if not any(re.search(pattern, matrix.module) for matrix in found):
            raise PlanError(
                f"--keep {pattern} matches no linear module",
                hint=f"they are named like {found[0].module}" if found else None,
            )
    return {m.module for m in found if any(re.search(pattern, m.module) for pattern in patterns)}


def _split(
    found: Sequence[Matrix], kept: Set[str], beside: Sequence[str], split: Sequence[str]
) -> PlanError:
    """The sentence on patterns that set apart what servers run as one; one list is not empty."""
    groups = scheme_groups(matrix.module for matrix in found)
    other = (*beside, *split)[0]
    partner = next(part for part in groups[other] if part in kept or part != other)
    option = "--keep" if beside else "--scheme"
    return PlanError(
        f"{option} sets {partner} apart from {other}, which vLLM and SGLang run as one with it",
        hint="name all of them, or leave --strict out, which widens the pattern",
    )


def _entries(model: Model, recipe: Recipe, importance: Shapes | None) -> set[str]:
    """Names of the GGUF tensors for which the importance matrix counts."""
    if importance is None:
        return set()
    refuse_foreign(importance, model.tensors)
    entries = select_entries(
        importance, include=recipe.include_weights, exclude=recipe.exclude_weights
    )
    return {tensor.name for tensor in model.tensors if applies(entries, tensor)}


def list_copies(
    model: Model,
    items: Sequence[Item],
    wanted: str | None,
    dtype: str,
    dropped: Sequence[Matrix] = (),
    names: Mapping[str, str] | None = None,
) -> tuple[tuple[Copy, ...], tuple[Note, ...]]:
    """What is not quantized; ``names`` are the output's where they differ from the stored ones.

    The ``dropped`` matrices of a stack go to where they would have gone quantized.
    """
    stored = model.store.tensors
    taken = {item.source for item in items}
    weights = {piece.source for tensor in model.tensors for piece in tensor.pieces}
    copies, left = [], []
    for matrix in dropped:
        if matrix.of > 1 and not matrix.transpose:
            taken.add(matrix.source)
            lead = (matrix.stack,) if matrix.stack else ()
            copies.append(
                Copy(
                    matrix.source, f"{matrix.module}.weight",
                    (*lead, matrix.rows, matrix.columns),
                    wanted or float_of(stored[matrix.source].dtype, dtype),
                    matrix.rows, matrix.first, matrix.slot * matrix.rows,
                )
            )  # fmt: skip
    for name, info in sorted(stored.items(), key=lambda entry: natural(entry[0])):
        if name in taken:
            continue
        # What is quantized and no part of the language model is told from integers by its type.
        if name not in weights and info.dtype not in _FLOATS and not info.dtype.startswith("F8_"):
            left.append(name)
            continue
        kind = wanted or float_of(info.dtype, dtype)
        name_out = (names or {}).get(name, name)
        copies.append(Copy(name, name_out, info.shape, kind, row_count(info.shape)))
    notes: tuple[Note, ...] = ()
    if left:
        notes = (Note(f"{len(left)} stored tensors hold no weights and are left out: {left[0]}"),)
    return tuple(copies), notes


def float_of(stored: str, dtype: str) -> str:
    """What is written for a tensor that is stored as ``stored`` in a model of ``dtype``."""
    return _FLOATS.get(stored, dtype)
