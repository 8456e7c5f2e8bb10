"""``--to`` a layout of `quantcli.layouts`: a GGUF's own codes in a folder of that layout.

Another folder's codes go through `quantcli.exports.folder_to_folder`.

Nothing is rounded: every linear layer must be in one of the grids of `quantcli.exports.blocks`,
all with as many bits, and the weights that a runtime computes from the result are those of the
GGUF, bit for bit. What is not a linear layer stays a float, in F16 where that holds it exactly.
Everything else is refused, with the command that quantizes anew, or rounded a second time where
that is asked for: to the format's usual grid.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from quantcli.artifacts.atomic_folder import refuse_folder
from quantcli.artifacts.model_folder import prepare_folder
from quantcli.artifacts.nearest_codes import CodeSource
from quantcli.artifacts.write import write_artifact
from quantcli.checkpoint_view import CheckpointView
from quantcli.errors import PlanError, SourceError
from quantcli.exports.blocks import GRIDS, GROUP, BlockCodes, StoredRows
from quantcli.exports.floats import fits
from quantcli.exports.folder_to_folder import prepare_codes
from quantcli.exports.gguf_checkpoint import as_checkpoint, find_config, view_checkpoint
from quantcli.exports.settings import complete_config
from quantcli.exports.targets import ExportOptions, Prepared, stem
from quantcli.exports.to_hf import folder_files
from quantcli.formats.integer import IntegerGrid
from quantcli.layouts.base import Grids, Layout
from quantcli.model import Model, open_model
from quantcli.plan.folders import FolderPlan, make_folder_plan
from quantcli.plan.linear_layers import find_matrices
from quantcli.plan.recipe import Recipe
from quantcli.report.units import size_text
from quantcli.sources.resolve import Resolved
from quantcli.types import Matrix, row_count

_FLOATS = ("F32", "F16", "BF16", "F64")
_ROWS = 1024


def prepare(
    layout: Layout, found: Resolved, label: str, options: ExportOptions, stack: ExitStack
) -> Prepared:
    """Decide a folder of the codes of a GGUF; SourceError or PlanError where it cannot be."""
    to, grids = layout.name, layout.grids
    if found.kind == "checkpoint":
        return prepare_codes(layout, found, label, options, stack)
    if found.kind != "gguf":
        raise SourceError(f"{label} is no model, and --to {to} repacks the codes of one")
    if grids is None:
        raise PlanError(
            f"--to {to} has no grid of a GGUF's",
            hint=f"quantcli export {label} --to hf, then quantcli quantize --to {to}",
        )
    path = options.output or Path(f"{stem(found)}-{to}")
    if options.check:
        refuse_folder(path, force=options.force)
    model = stack.enter_context(open_model(label))
    config = find_config(model, options.config)
    view = view_checkpoint(model, config)
    checkpoint = as_checkpoint(model, config, view)
    if options.requantize:
        recipe = Recipe(to=to)
    else:
        recipe = _recipe(checkpoint, view, layout, grids, label)
    if options.split_max_size is not None:
        recipe = replace(recipe, split_max_size=str(options.split_max_size))
    plan = make_folder_plan(checkpoint, recipe, importance=None)
    grid, plan = _exact(plan, grids, view, options.dtype)
    kind = _kind(view, plan.items[0].matrix) if plan.items else ""
    block = None if options.requantize else layout.blocks.get(kind)
    codes: CodeSource | None = None
    if block is not None:
        codes = StoredRows(view)
    elif not options.requantize:
        codes = BlockCodes(view, grid)
        if grid.zero == "integer":
            _try_all(plan, view, codes, to, label)
    label_of = plan.label if block is None else kind
    checkpoint = replace(
        checkpoint, config=complete_config(config, model.metadata, plan.dtype, options.config)
    )
    origin = "rounded again from" if options.requantize else "the codes of"
    facts = [("weights", f"{label_of}, {origin} {_types(plan, view)}")]
    files, notes = folder_files(model, path, options, layout=layout, dtype=plan.dtype, facts=facts)
    job = prepare_folder(
        checkpoint,
        recipe,
        path,
        plan=plan,
        packing=block,
        files=files,
        force=options.force,
        check=options.check,
    )
    plan = replace(plan, notes=(*plan.notes, *notes))
    job = replace(job, plan=plan, codes=codes)
    return Prepared(
        (path,),
        job.nbytes,
        f"{len(plan.items)} matrices in {label_of}, "
        + ("rounded a second time" if options.requantize else "bit for bit"),
        lambda: write_artifact(job, threads=options.threads),
    )


def _recipe(model: Model, view: CheckpointView, layout: Layout, grids: Grids, label: str) -> Recipe:
    """What describes the grid that the GGUF has; PlanError where it has none of the layout's."""
    to = layout.name
    matrices = find_matrices(
        model, embeddings=layout.embeddings, stacked=layout.stacked, packed=True
    )
    inner = {matrix.source for matrix in find_matrices(model)}
    hint = (
        f"quantcli export {label} --to hf makes a checkpoint, which quantcli quantize --to {to} "
        "quantizes anew, as --requantize does; the original model is better"
    )
    kept, taken = [], []
    for matrix in matrices:
        kind = _kind(view, matrix)
        pieces = [use.piece for use in view.uses[matrix.source]]
        if any(not piece.makes_outputs or piece.turns_columns for piece in pieces):
            # Blocks that lie across its rows or columns cannot be put back: it is stored in floats.
            kept.append(matrix)
        elif _holds(layout, grids, kind) and not matrix.transpose:
            taken.append(matrix)
        elif kind in _FLOATS or matrix.source not in inner:
            kept.append(matrix)
        else:
            turned = "lies transposed there" if matrix.transpose else f"--to {to} does not have"
            raise PlanError(
                f"{view.holder(matrix.source).name} is {kind}, which {turned}, so it cannot "
                "be repacked without loss",
                hint=hint,
            )
    whole = {kind for matrix in taken if (kind := _kind(view, matrix)) in layout.blocks}
    bits = {_bits(view, matrix) for matrix in taken if matrix.source in inner}
    if whole and len({_kind(view, matrix) for matrix in taken}) > 1:
        raise PlanError(
            f"{label} has linear layers in {' and '.join(sorted(whole))} and in others", hint=hint
        )
    if len(bits) != 1:
        what = "no quantized linear layer" if not bits else f"linear layers of {sorted(bits)} bits"
        raise PlanError(f"{label} has {what}, and --to {to} takes one grid for all", hint=hint)
    kept += [matrix for matrix in taken if _bits(view, matrix) not in bits]
    taken = [matrix for matrix in taken if _bits(view, matrix) in bits]
    affine = any(GRIDS[kind].affine for m in taken if (kind := _kind(view, m)) in GRIDS)
    symmetric = None if grids.symmetric is None else not affine
    return Recipe(
        to=to,
        bits=bits.pop(),
        group_size=GROUP,
        symmetric=symmetric,
        keep=tuple(f"^{re.escape(matrix.module)}$" for matrix in kept),
    )


def _kind(view: CheckpointView, matrix: Matrix) -> str:
    return view.holder(matrix.source).dtype


def _bits(view: CheckpointView, matrix: Matrix) -> int:
    kind = _kind(view, matrix)
    return GRIDS[kind].bits if kind in GRIDS else 4


def _holds(layout: Layout, grids: Grids, kind: str) -> bool:
    """Whether the layout has the grid of a block format."""
    fits = kind in GRIDS and GRIDS[kind].bits in grids.bits
    return kind in layout.blocks or (fits and grids.has_group(GROUP))


def _exact(
    plan: FolderPlan, grids: Grids, view: CheckpointView, dtype: str | None
) -> tuple[IntegerGrid, FolderPlan]:
    """The plan with float16 scales, as blocks have, and floats that lose nothing.

    What computes in the dtype of its scales has them in float32, too, where the model is in it.
    """
    copies = [
        replace(copy, dtype=dtype or ("F16" if fits(view, copy.source, "F16") else "F32"))
        for copy in plan.copies
    ]
    loaded = dtype or ("F32" if any(copy.dtype == "F32" for copy in copies) else "F16")
    scheme = plan.schemes[0] if plan.schemes else None
    if scheme is None or not isinstance(scheme.grid, IntegerGrid):
        raise PlanError(f"--to {plan.recipe.to} has no integer grid")
    is_wide = loaded == "F32" and grids.computes_in_scales
    grid = replace(scheme.grid, scale_dtype="F32" if is_wide else "F16", lowest_zero=0)
    scheme = replace(scheme, grid=grid)
    items = tuple(replace(item, scheme=scheme) for item in plan.items)
    return grid, replace(plan, copies=tuple(copies), items=items, dtype=loaded)


def _try_all(
    plan: FolderPlan, view: CheckpointView, codes: BlockCodes, to: str, label: str
) -> None:
    """PlanError when a group's code 0 is not a whole number of scales; reads the affine ones."""
    for item in plan.items:
        if not GRIDS[view.holder(item.source).dtype].affine:
            continue
        for start in range(0, item.rows, _ROWS):
            first = item.first + start
            stop = min(first + _ROWS, item.first + item.rows)
            try:
                codes(item.matrix, start, view.read_rows(item.source, first, stop))
            except PlanError as refused:
                raise PlanError(
                    refused.message,
                    hint=f"--to mlx holds any zero point; quantcli export {label} --to hf, then "
                    f"quantcli quantize --to {to}, quantizes anew",
                ) from None


def _types(plan: FolderPlan, view: CheckpointView) -> str:
    kinds = sorted({view.holder(item.source).dtype for item in plan.items})
    nbytes = sum(
        view.tensors[item.source].nbytes * item.rows // row_count(view.tensors[item.source].shape)
        for item in plan.items
    )
    return f"{' and '.join(kinds)} ({size_text(nbytes)})"
