"""The plan of a model folder: which of a checkpoint's tensors are quantized, and which are copied.

The tensors keep their names and row order. For the integer formats the linear layers are quantized
and the rest is copied; for ``hf`` each matrix takes the way through the block format that the GGUF
planner gives to the GGUF tensor of the same weights, and back. Only headers are looked at.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from quantcli.archs import find_architecture
from quantcli.archs.config import class_name
from quantcli.errors import PlanError
from quantcli.formats import get_format
from quantcli.model import Model
from quantcli.plan.importance import Shapes, applies, refuse_foreign, select_entries
from quantcli.plan.linear_layers import (
    find_matrices,
    kept_modules,
    natural,
    router_names,
    whole_stacks,
)
from quantcli.plan.planner import Plan, make_plan
from quantcli.plan.recipe import Recipe
from quantcli.plan.recipe_check import check_recipe
from quantcli.plan.schemes import DTYPES, Scheme, SchemeRule, has_types, make_schemes
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
    """Every decision about a model folder; ``kept`` are linear modules that stay as they are."""

    recipe: Recipe
    dtype: str
    items: tuple[Item, ...]
    copies: tuple[Copy, ...]
    kept: tuple[str, ...]
    notes: tuple[Note, ...] = ()

    @property
    def label(self) -> str:
        """What the quantized matrices become."""
        return " and ".join(scheme.label for scheme in self.schemes) or self.recipe.type

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Those of the quantized matrices, each once; none where they have block formats."""
        return tuple({s.label: s for item in self.items if (s := item.scheme)}.values())

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
    layout = rules[0].scheme.layout
    found = find_matrices(model, embeddings=layout.embeddings, stacked=layout.stacked, packed=True)
    schemes, split = _assign(found, rules)
    bare = {matrix.module for matrix in found if matrix.module not in schemes}
    odd = [] if model.untabled is None else _unfit(found, recipe.keep, schemes)
    matrices, dropped, widened = _keep(found, recipe.keep, {m.module for m in odd} | bare)
    names = router_names(model)
    shared = math.gcd(*(matrix.columns for matrix in matrices if not matrix.transpose))
    for matrix in matrices:
        _check_matrix(model, matrix, schemes[matrix.module], shared)
    used = _entries(model, recipe, importance)
    items = tuple(
        Item(matrix, importance=matrix.tensor in used, scheme=schemes[matrix.module])
        for matrix in matrices
    )
    again = Counter(model.store.tensors[matrix.source].dtype for matrix in matrices)
    notes = [
        Note(
            f"{count} matrices are stored as {dtype} and are rounded a second time; the original "
            "model gives a better result",
            "warning",
        )
        for dtype, count in again.items()
        if dtype not in _FLOATS
    ]
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
    if odd:
        notes.append(
            Note(
                f"{len(odd)} small matrices do not fit --to {recipe.to} and are kept as they are, "
                f"such as {odd[0].module}"
            )
        )
    if widened:
        shown = ", ".join(widened[:3]) + (" ..." if len(widened) > 3 else "")
        kept_ones = "others that are kept" if odd else "those that --keep names"
        notes.append(
            Note(
                f"{len(widened)} more matrices are kept as they are, because vLLM and SGLang run "
                f"them as one with {kept_ones}: {shown}",
                "warning",
            )
        )
    if split:
        notes.append(
            Note(
                f"{len(split)} modules have the scheme of what vLLM and SGLang run with them as "
                f"one: {', '.join(split[:3])}" + (" ..." if len(split) > 3 else ""),
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
            )
        )
    lacking = sum(not item.importance for item in items)
    if importance is not None and lacking:
        notes.append(
            Note(f"the importance matrix has nothing for {lacking} of {len(items)} matrices")
        )
    notes += mtp_notes(model)
    copies, dropped_notes = _copies(model, items, recipe.dtype, dtype, dropped, names)
    kept = kept_modules(model, matrices, dropped, names, head=not layout.embeddings)
    return FolderPlan(recipe, dtype, items, copies, kept, (*notes, *dropped_notes))


def _plan_types(model: Model, recipe: Recipe, dtype: str, importance: Shapes | None) -> FolderPlan:
    plan = make_plan(model.tensors, model.metadata, recipe, importance=importance)
    plain = _FLOATS.get(recipe.type)
    wanted = recipe.dtype or plain
    stored = model.store.tensors
    items = tuple(
        Item(matrix, format_name, wanted or float_of(stored[matrix.source].dtype, dtype), weighted)
        for matrix, format_name, weighted in _coded(model, plan)
    )
    copies, notes = _copies(model, items, wanted, dtype)
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


_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linear layers that servers run as one matrix, which has one scheme."""


_FEW = 0.1
"""Share of the weights up to which matrices without a table are kept where they do not fit."""


def _assign(
    found: Sequence[Matrix], rules: Sequence[SchemeRule]
) -> tuple[dict[str, Scheme], list[str]]:
    """Each module's scheme, and modules that have it for the sake of those they are run with."""
    schemes: dict[str, Scheme] = {}
    order: dict[str, int] = {}
    for rule in rules:
        if rule.pattern and not any(re.search(rule.pattern, matrix.module) for matrix in found):
            raise PlanError(
                f"--scheme {rule.pattern}={rule.scheme.label} matches no linear module",
                hint=f"they are named like {found[0].module}" if found else None,
            )
    for matrix in found:
        for index, rule in enumerate(rules):
            if rule.pattern is None or re.search(rule.pattern, matrix.module):
                schemes[matrix.module], order[matrix.module] = rule.scheme, index
                break
    split = []
    for module in [matrix.module for matrix in found]:
        parts = [part for part in fused_with(module) if part in order]
        first = min(parts, key=lambda part: order[part], default=module)
        if first in schemes and schemes.get(module) is not schemes[first]:
            schemes[module] = schemes[first]
            split.append(module)
    return schemes, split


def fused_with(module: str) -> list[str]:
    """The linear modules that servers run as one with ``module``, itself among them."""
    block, _, leaf = module.rpartition(".")
    return next(
        ([f"{block}.{part}" for part in parts] for parts in _FUSED if leaf in parts), [module]
    )


def _unfit(
    found: Sequence[Matrix], kept: Sequence[str], schemes: Mapping[str, Scheme]
) -> list[Matrix]:
    """Matrices that their scheme does not hold, where they are a small part of ``found``.

    Those that patterns have ``kept`` do not count.

    Such are the low ranks beside a model's linear layers: a state's step sizes, adapters.
    """

    def fails(matrix: Matrix) -> bool:
        scheme = schemes.get(matrix.module)
        if scheme is None or any(re.search(pattern, matrix.module) for pattern in kept):
            return False
        size = scheme.grid.group_size
        divides = size is None or matrix.columns % size == 0
        return not divides or scheme.packing.refuse(matrix, scheme.grid) is not None

    odd = [matrix for matrix in found if fails(matrix)]
    whole = sum(matrix.elements for matrix in found)
    return odd if sum(matrix.elements for matrix in odd) <= _FEW * whole else []


def _keep(
    found: Sequence[Matrix], patterns: Sequence[str], odd: Set[str]
) -> tuple[list[Matrix], list[Matrix], list[str]]:
    """The matrices to quantize, those that are kept, and modules kept because of others.

    Kept are those that ``patterns`` match and the ``odd`` ones.
    """
    for pattern in patterns:
        if not any(re.search(pattern, matrix.module) for matrix in found):
            raise PlanError(
                f"--keep {pattern} matches no linear module",
                hint=f"they are named like {found[0].module}" if found else None,
            )
    named = {m.module for m in found if any(re.search(pattern, m.module) for pattern in patterns)}
    named |= odd
    fused = {part for module in named for part in fused_with(module)}
    kept = [matrix for matrix in found if matrix.module in named | fused]
    dropped = set(kept)
    widened = list(dict.fromkeys(m.module for m in kept if m.module not in named))
    return [matrix for matrix in found if matrix not in dropped], kept, widened


def _check_matrix(model: Model, matrix: Matrix, scheme: Scheme, shared: int) -> None:
    """PlanError for a matrix that the scheme does not take; ``shared`` divides all columns."""
    info = model.store.tensors[matrix.source]
    if matrix.transpose:
        raise PlanError(
            f"{info.file}: {info.name} is stored transposed, which --to {scheme.layout.name} does "
            "not do",
            hint="--to hf or a GGUF",
        )
    size = scheme.grid.group_size
    if size is not None and matrix.columns % size:
        groups = scheme.groups or (128, 64, 32, 16, 8)
        fits = next((g for g in sorted(groups, reverse=True) if shared % g == 0), None)
        hint = f"--group-size {fits} does, " if fits else ""
        alike = re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(matrix.module))
        raise PlanError(
            f"{info.file}: groups of {size} do not divide the {matrix.columns} columns of "
            f"{info.name}",
            hint=f"{hint}or --keep '{alike}' leaves these matrices as they are",
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


def _copies(
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
