"""A quantized folder in another layout: the same codes, or its weights in plain floats.

Codes are read as they are stored and written as they are; scales and zero points take the form of
the other layout, which `quantcli.plan.same_grid` has found to hold them. Every row is decoded both
ways as it passes, and a weight that is not the same ends the export and leaves nothing behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli import __version__
from quantcli.artifacts.atomic_folder import MANIFEST, refuse_folder
from quantcli.artifacts.folder_files import to_json
from quantcli.artifacts.model_card import render_card
from quantcli.artifacts.model_folder import ModelFolder, prepare_folder
from quantcli.artifacts.slabs import UNFINISHED
from quantcli.artifacts.static_scales import StaticScales
from quantcli.artifacts.write import write_artifact
from quantcli.errors import PlanError, SourceError, UsageError
from quantcli.exports.cards import make_card
from quantcli.exports.floats import fits
from quantcli.exports.targets import ExportOptions, Prepared, stem
from quantcli.formats.float_grid import FloatGrid
from quantcli.formats.integer import GridCodes
from quantcli.formats.regrid import UnfitError, as_read, regrid
from quantcli.layouts.base import CodeGrid, Layout
from quantcli.layouts.hf import HF
from quantcli.layouts.stored_codes import CodedStore, divisor
from quantcli.model import Model, open_model
from quantcli.plan.folders import Copy, FolderPlan, list_copies, make_folder_plan, model_dtype
from quantcli.plan.recipe import Recipe
from quantcli.plan.same_grid import SameCodes, equal_weights, plan_same_codes
from quantcli.plan.schemes import Scheme
from quantcli.report.units import size_text
from quantcli.sources.card import CARD
from quantcli.sources.files import read_json
from quantcli.sources.resolve import Resolved
from quantcli.types import Matrix, Note

_FLOATS = ("F64", "F32", "F16", "BF16")


class SameRows:
    """Gives a folder's stored codes on another grid: a `CodeSource` that rounds nothing.

    PlanError for rows whose weights would not be the same.
    """

    def __init__(self, store: CodedStore, same: SameCodes) -> None:
        self._store = store
        self._same = same
        self._schemes: dict[tuple[str, int], Scheme] = {
            (item.source, item.first): item.scheme for item in same.plan.items if item.scheme
        }

    def __call__(self, matrix: Matrix, start: int, rows: NDArray[Any]) -> GridCodes:
        """The codes of the decoded ``rows`` of ``matrix`` from ``start`` on."""
        first = matrix.first + start
        grid = self._same.grids[matrix.source]
        target = self._schemes[matrix.source, matrix.first].grid
        stored = self._store.read_codes(matrix.source, first, first + len(rows))
        whole = divisor(*self._store.read_whole(matrix.source))
        try:
            coded = regrid(stored, grid, target, whole)
        except UnfitError as unfit:
            raise PlanError(f"{matrix.source}: {unfit}") from unfit
        apart = ~equal_weights(_decode(coded, target), rows, exact=self._same.exact)
        if apart.any():
            row, column = (int(index) for index in np.argwhere(apart)[0])
            raise PlanError(
                f"{matrix.source}: the weight {rows[row, column]} at row {first + row}, column "
                f"{column} is none of {target.label}'s"
            )
        return coded


def _decode(coded: GridCodes, grid: CodeGrid) -> NDArray[np.float32]:
    """The weights that a reader makes of the codes once they are stored."""
    if isinstance(grid, FloatGrid):
        bound = grid if coded.whole is None else grid.with_whole(coded.whole)
        return bound.dequantize(replace(coded, scales=as_read(coded.scales, bound)))
    return grid.dequantize(coded)


def prepare_codes(
    layout: Layout, found: Resolved, label: str, options: ExportOptions, stack: ExitStack
) -> Prepared:
    """Decide a folder of ``layout`` with the codes of a checkpoint; PlanError where it has others.

    With ``requantize`` the weights are rounded to the layout's usual grid instead.
    """
    _refuse_gguf_options(options)
    path = options.output or Path(f"{stem(found)}-{layout.name}")
    if options.check:
        refuse_folder(path, force=options.force)
    model = stack.enter_context(open_model(label, table=False, found=found))
    recipe = _with_options(Recipe(to=layout.name, allow_requantize=True), options)
    if options.requantize:
        plan = make_folder_plan(model, recipe, importance=None)
        job = _prepare(model, layout, plan, path, options, "rounded again from")
        return _prepared(job, path, f"{len(plan.items)} matrices in {plan.label}, rounded", options)
    same = plan_same_codes(model, layout, recipe, label)
    plan = _hold_copies(model, same.plan, options)
    job = _prepare(model, layout, plan, path, options, "the codes of")
    if not isinstance(model.store, CodedStore):
        raise TypeError("the plan has codes of a store that has none")
    scales = StaticScales(same.carried.inputs, same.carried.caches)
    job = replace(job, codes=SameRows(model.store, same), scales=scales)
    how = "bit for bit" if same.exact else "the same codes and scales"
    return _prepared(job, path, f"{len(plan.items)} matrices in {plan.label}, {how}", options)


def prepare_floats(
    found: Resolved, label: str, options: ExportOptions, stack: ExitStack
) -> Prepared:
    """Decide ``--to hf`` for a checkpoint: what is quantized becomes floats."""
    _refuse_gguf_options(options)
    path = options.output or Path(f"{stem(found)}-hf")
    if options.check:
        refuse_folder(path, force=options.force)
    model = stack.enter_context(open_model(label, table=False, found=found))
    if all(info.dtype in _FLOATS for info in model.store.tensors.values()):
        raise SourceError(
            f"{label} is stored in floats already",
            hint=f"quantcli quantize {label} --to hf writes it in another precision",
        )
    dtype = options.dtype or model_dtype(model)
    recipe = _with_options(Recipe(to=HF.name, type=dtype, allow_requantize=True), options)
    plan = make_folder_plan(model, recipe, importance=None)
    copies, _ = list_copies(model, plan.items, options.dtype, dtype)
    notes = plan.notes
    if dtype != "F32":
        notes = (*notes, Note(f"weights are decoded to {dtype}; --dtype f32 loses nothing"))
    plan = replace(plan, copies=copies, dtype=dtype, notes=notes)
    job = _prepare(model, HF, plan, path, options, "decoded from")
    tensors = len({item.source for item in plan.items} | {copy.name for copy in plan.copies})
    return _prepared(job, path, f"{tensors} tensors in {dtype}", options)


def _refuse_gguf_options(options: ExportOptions) -> None:
    for name in ("config", "tokenizer"):
        if getattr(options, name) is not None:
            raise UsageError(
                f"--{name} is for a GGUF, which has no such files",
                hint="a folder's own are taken; leave it out",
            )


def _with_options(recipe: Recipe, options: ExportOptions) -> Recipe:
    size = options.split_max_size
    return replace(recipe, dtype=options.dtype, split_max_size=None if size is None else str(size))


def _prepare(
    model: Model, layout: Layout, plan: FolderPlan, path: Path, options: ExportOptions, origin: str
) -> ModelFolder:
    kinds = _kinds(model, plan)
    weights = (
        f"{plan.label}, {origin} {kinds}" if plan.schemes else f"{plan.dtype}, {origin} {kinds}"
    )
    card = make_card(
        model, path.name, layout.library, [("weights", weights)], layout.usage(path.name),
        options.evaluation,
    )  # fmt: skip
    files = {CARD: render_card(card), MANIFEST: to_json(_manifest(model, layout.name, plan))}
    return prepare_folder(
        model, plan.recipe, path, plan=plan, files=files, force=options.force, check=options.check
    )


def _kinds(model: Model, plan: FolderPlan) -> str:
    """What the quantized matrices are stored as, and how large they are there."""
    sources = {item.source: model.store.tensors[item.source] for item in plan.items}
    packed = [info for info in sources.values() if info.dtype not in _FLOATS]
    kinds = Counter(str(info.dtype) for info in packed)
    nbytes = sum(info.nbytes for info in packed)
    return f"{' and '.join(sorted(kinds))} ({size_text(nbytes)})"


def _manifest(model: Model, to: str, plan: FolderPlan) -> Mapping[str, Any]:
    """What quantcli.json says: what was exported, and how that was made, if it says so."""
    before = model.path / MANIFEST
    recipe = read_json(before).get("recipe") if before.is_file() else None
    source = {"repo": model.repo, "revision": model.revision, "digest": UNFINISHED}
    return {
        "schema": "quantcli.manifest/1",
        "quantcli": __version__,
        "to": to,
        "exported_from": model.path.resolve().name,
        "dtype": plan.dtype,
        "recipe": recipe,
        "source": {key: value for key, value in source.items() if value is not None},
    }


def _prepared(job: ModelFolder, path: Path, sentence: str, options: ExportOptions) -> Prepared:
    return Prepared(
        (path,), job.nbytes, sentence, lambda: write_artifact(job, threads=options.threads)
    )


def _hold_copies(model: Model, plan: FolderPlan, options: ExportOptions) -> FolderPlan:
    """The plan with each decoded matrix in a float type that holds it, unless one was asked for."""
    if options.dtype is not None:
        return plan
    chosen: dict[str, str] = {}
    for copy in plan.copies:
        if model.store.tensors[copy.source].dtype not in _FLOATS and copy.source not in chosen:
            kinds = dict.fromkeys((plan.dtype, "F16", "BF16"))
            held = (kind for kind in kinds if fits(model.store, copy.source, kind))
            chosen[copy.source] = next(held, "F32")
    if not chosen:
        return plan
    copies = tuple(_in_dtype(copy, chosen) for copy in plan.copies)
    names = list(chosen)
    note = Note(
        f"{len(names)} quantized matrices have no place for codes there and are decoded to "
        f"{' and '.join(dict.fromkeys(chosen.values()))}, such as {names[0]}",
        "warning",
    )
    return replace(plan, copies=copies, notes=(*plan.notes, note))


def _in_dtype(copy: Copy, chosen: Mapping[str, str]) -> Copy:
    return replace(copy, dtype=chosen.get(copy.source, copy.dtype))
