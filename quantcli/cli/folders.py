"""``quantize --to FORMAT``: the run that makes a model folder, and how it is shown."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.cli.methods import finish, plan_run, round_beside, transform_beside
from quantcli.cli.running import calibrate_beside

if TYPE_CHECKING:
    from quantcli.artifacts.model_folder import ModelFolder
    from quantcli.cli.methods import Calibrating
    from quantcli.cli.output import Output
    from quantcli.plan.recipe import Recipe
    from quantcli.run.job import Encoding, MethodJob
    from quantcli.sources.imatrix import Importance


def make_folder(
    out: Output,
    target: str,
    recipe: Recipe,
    output: Path | None,
    told: Calibrating,
    *,
    dry_run: bool,
    force: bool,
    threads: int | None,
    limit: int | None,
) -> None:
    """Plan the folder, and make it unless this is a dry run."""
    from quantcli.artifacts.model_folder import prepare_folder
    from quantcli.artifacts.prepare import default_output
    from quantcli.artifacts.write import threads_within
    from quantcli.model import open_model
    from quantcli.plan.recipe import merge_recipe
    from quantcli.plan.recipe_check import check_recipe
    from quantcli.sources.imatrix import read_importance

    check_recipe(recipe)
    importance = read_importance(Path(recipe.imatrix)) if recipe.imatrix else None
    with open_model(target, vocabulary=bool(told.data), on_progress=out.event) as model:
        path = output or default_output(model, recipe)
        planned = plan_run(model, recipe, told) if recipe.method else None
        if planned is not None:
            importance = _known(recipe, planned.importance)
        elif told.data:
            # What would stop the quantization afterwards stops it before the long run.
            prepare_folder(model, recipe, path, force=force)
            made = calibrate_beside(
                out, model, list(told.data), path,
                chunks=told.chunks, force=force, threads=threads,
            )  # fmt: skip
            recipe = merge_recipe(recipe, imatrix=str(made))
            importance = read_importance(made)
        job = prepare_folder(
            model, recipe, path, importance=importance, force=force, check=not dry_run
        )
        workers = threads_within(job, threads, limit)
        if dry_run:
            _show_plan(out, job, workers)
        elif planned is None or recipe.method is None:
            _execute(out, job, workers)
        else:
            _run_method(out, planned, job, told, recipe.method, workers, threads)


def _run_method(
    out: Output, planned: MethodJob, job: ModelFolder, told: Calibrating, method: str, workers: int,
    threads: int | None,
) -> None:  # fmt: skip
    """Transform, then round with feedback or, where no method rounds, to the nearest."""
    from quantcli.artifacts.model_folder import prepare_folder
    from quantcli.run.methods import parse_methods
    from quantcli.transforms.transformed_checkpoint import as_checkpoint, note_copies

    chain, recipe = parse_methods(method), job.plan.recipe
    if chain.transforms:
        moved = transform_beside(out, planned, chain, job.plan, job.path, threads=threads)
        planned = planned.of(as_checkpoint(moved.model))
        importance = _known(recipe, moved.importance or planned.importance)
        job = prepare_folder(
            planned.model, recipe, job.path, importance=importance, force=job.force
        )
        for note in note_copies(planned.model, job.plan):
            out.event(note)
    if not chain.rounds:
        _execute(out, job, workers)
        return
    encoding = round_beside(
        out, planned, job.plan, job.path, told, force=job.force, threads=threads
    )
    _execute(out, job, workers, encoding)
    finish(encoding)


def _known(recipe: Recipe, importance: Importance) -> Importance | None:
    """What ranges are weighted by; nothing where the recipe says how they are found without."""
    from quantcli.plan.schemes import knows_importance

    return importance if knows_importance(recipe) else None


def _show_plan(out: Output, job: ModelFolder, threads: int) -> None:
    from quantcli.report.folders import folder_document, folder_tables

    for note in job.plan.notes:
        out.event(note)
    if out.json:
        out.document("plan", 1, folder_document(job, threads))
        return
    for table in folder_tables(job, threads):
        out.table(table)


def _execute(out: Output, job: ModelFolder, threads: int, encoding: Encoding | None = None) -> None:
    from quantcli.artifacts.write import Finished, write_artifact
    from quantcli.report.units import duration_text, size_text

    start = time.monotonic()
    source = None
    if encoding is not None:
        from quantcli.run.folder_codes import stored_codes

        source = stored_codes(job, encoding.store)
    with out.phase("quantizing"):
        for event in write_artifact(replace(job, codes=source), threads=threads):
            if not isinstance(event, Finished):
                out.event(event)
                continue
            finished = event
    stored = sum(info.nbytes for info in job.model.store.tensors.values())
    out.say(
        f"{size_text(stored)} became {size_text(finished.nbytes)} at "
        f"{finished.bits_per_weight:.2f} bits per weight ({job.plan.label}) "
        f"in {duration_text(time.monotonic() - start)}"
    )
    if out.json:
        fields: dict[str, Any] = {
            "paths": [str(job.path)],
            "to": job.plan.recipe.to,
            "type": job.plan.label,
            "bytes": finished.nbytes,
            "bits_per_weight": finished.bits_per_weight,
            "source_bytes": stored,
            "source_digest": finished.source_digest,
        }
        if encoding is not None:
            from quantcli.run.job import outcome_rows

            fields["tensors"] = outcome_rows(encoding.store.outcomes)
        out.document("quantize", 1, fields)
        return
    out.result(job.path)
