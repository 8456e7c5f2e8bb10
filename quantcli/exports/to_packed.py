"""``--to`` a layout of `quantcli.layouts`: a GGUF's own codes in a folder of that layout.

Another folder's codes go through `quantcli.exports.folder_to_folder`.

Nothing is rounded: every linear layer must be in one of the grids of `quantcli.exports.gguf_codes`,
and the weights that a runtime computes from the result are those of the GGUF, bit for bit. What is
not a linear layer stays a float, in F16 where that holds it exactly. Everything else is refused,
with the command that quantizes anew, or rounded a second time where that is asked for: to the
format's usual grid.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from quantcli.artifacts.atomic_folder import refuse_folder
from quantcli.artifacts.model_folder import prepare_folder
from quantcli.artifacts.nearest_codes import CodeSource
from quantcli.artifacts.write import write_artifact
from quantcli.checkpoint_view import CheckpointView
from quantcli.errors import SourceError
from quantcli.exports.floats import fits
from quantcli.exports.folder_to_folder import SameRows, prepare_codes
from quantcli.exports.gguf_checkpoint import as_checkpoint, find_config, view_checkpoint
from quantcli.exports.gguf_codes import view_codes
from quantcli.exports.settings import complete_config
from quantcli.exports.targets import ExportOptions, Prepared, stem
from quantcli.exports.to_hf import folder_files
from quantcli.formats.integer import IntegerGrid
from quantcli.layouts.base import Layout
from quantcli.model import open_model
from quantcli.plan.folders import FolderPlan, Item, make_folder_plan
from quantcli.plan.recipe import Recipe
from quantcli.plan.same_grid import plan_same_codes
from quantcli.report.units import size_text
from quantcli.sources.resolve import Resolved
from quantcli.types import row_count


def prepare(
    layout: Layout, found: Resolved, label: str, options: ExportOptions, stack: ExitStack
) -> Prepared:
    """Decide a folder of the codes of a GGUF; SourceError or PlanError where it cannot be."""
    if found.kind == "checkpoint":
        return prepare_codes(layout, found, label, options, stack)
    to = layout.name
    if found.kind != "gguf":
        raise SourceError(f"{label} is no model, and --to {to} repacks the codes of one")
    path = options.output or Path(f"{stem(found)}-{to}")
    if options.check:
        refuse_folder(path, force=options.force)
    model = stack.enter_context(open_model(label, found=found))
    config = find_config(model, options.config)
    view = view_codes(view_checkpoint(model, config), model)
    checkpoint = as_checkpoint(model, config, view)
    size = options.split_max_size
    recipe = Recipe(to=to, split_max_size=None if size is None else str(size))
    codes: CodeSource | None = None
    how = "rounded a second time"
    if options.requantize:
        plan = _exact(make_folder_plan(checkpoint, recipe, importance=None), view, options.dtype)
    else:
        same = plan_same_codes(
            checkpoint, layout, recipe, label, dtype="F16", hint=_hint(label, to)
        )
        plan = _exact(same.plan, view, options.dtype)
        codes = SameRows(view, replace(same, plan=plan))
        how = "bit for bit" if same.exact else "the same codes and scales"
    checkpoint = replace(
        checkpoint, config=complete_config(config, model.metadata, plan.dtype, options.config)
    )
    origin = "rounded again from" if options.requantize else "the codes of"
    facts = [("weights", f"{plan.label}, {origin} {_types(plan, view)}")]
    files, notes = folder_files(model, path, options, layout=layout, dtype=plan.dtype, facts=facts)
    plan = replace(plan, notes=(*plan.notes, *notes))
    job = prepare_folder(
        checkpoint,
        plan.recipe,
        path,
        plan=plan,
        files=files,
        force=options.force,
        check=options.check,
    )
    job = replace(job, codes=codes)
    return Prepared(
        (path,),
        job.nbytes,
        f"{len(plan.items)} matrices in {plan.label}, " + how,
        lambda: write_artifact(job, threads=options.threads),
    )


def _hint(label: str, to: str) -> str:
    return (
        f"quantcli export {label} --to hf makes a checkpoint, which quantcli quantize --to {to} "
        "quantizes anew, as --requantize does; the original model is better"
    )


def _exact(plan: FolderPlan, view: CheckpointView, dtype: str | None) -> FolderPlan:
    """The plan with floats that lose nothing, in F16 where that holds them.

    What computes in the dtype of its scales has them in float32, too, where the model is in it.
    """
    copies = [
        replace(copy, dtype=dtype or ("F16" if fits(view, copy.source, "F16") else "F32"))
        for copy in plan.copies
    ]
    loaded = dtype or ("F32" if any(copy.dtype == "F32" for copy in copies) else "F16")
    items = [_widen(item) for item in plan.items] if loaded == "F32" else plan.items
    return replace(plan, copies=tuple(copies), items=tuple(items), dtype=loaded)


def _widen(item: Item) -> Item:
    """The matrix with float32 scales, where its layout computes in these."""
    scheme = item.scheme
    if scheme is None or not isinstance(scheme.grid, IntegerGrid):
        return item
    grids = scheme.layout.grids
    if grids is None or not grids.computes_in_scales:
        return item
    return replace(item, scheme=replace(scheme, grid=replace(scheme.grid, scale_dtype="F32")))


def _types(plan: FolderPlan, view: CheckpointView) -> str:
    kinds = sorted({view.holder(item.source).dtype for item in plan.items})
    nbytes = sum(
        view.tensors[item.source].nbytes * item.rows // row_count(view.tensors[item.source].shape)
        for item in plan.items
    )
    return f"{' and '.join(kinds)} ({size_text(nbytes)})"
