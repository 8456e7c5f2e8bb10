"""``quantize --to FORMAT``: the run that makes a model folder, and how it is shown."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.cli.running import calibrate_beside

if TYPE_CHECKING:
    from quantcli.cli.methods import Calibrating
    from quantcli.cli.output import Output
    from quantcli.folder_job import FolderJob
    from quantcli.plan.recipe import Recipe


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
    from quantcli.folder_job import default_folder, folder_threads, prepare_folder
    from quantcli.model import open_model
    from quantcli.plan.recipe import check_recipe, merge_recipe
    from quantcli.sources.imatrix import read_importance

    check_recipe(recipe)
    importance = read_importance(Path(recipe.imatrix)) if recipe.imatrix else None
    with open_model(target, vocabulary=bool(told.data), on_progress=out.event) as model:
        path = output or default_folder(model, recipe)
        if told.data:
            # What would stop the quantization afterwards stops it before the long run.
            prepare_folder(model, recipe, path, force=force)
            made = calibrate_beside(out, model, list(told.data), path, force=force, threads=threads)
            recipe = merge_recipe(recipe, imatrix=str(made))
            importance = read_importance(made)
        job = prepare_folder(
            model, recipe, path, importance=importance, force=force, check=not dry_run
        )
        workers = folder_threads(job, threads, limit)
        if dry_run:
            _show_plan(out, job, workers)
        else:
            _execute(out, job, workers)


def _show_plan(out: Output, job: FolderJob, threads: int) -> None:
    from quantcli.report.folders import folder_document, folder_tables

    for note in job.plan.notes:
        out.event(note)
    if out.json:
        out.document("plan", 1, folder_document(job, threads))
        return
    for table in folder_tables(job, threads):
        out.table(table)


def _execute(out: Output, job: FolderJob, threads: int) -> None:
    from quantcli.folders import execute_folder
    from quantcli.pipeline import Finished
    from quantcli.report.units import duration_text, size_text

    start = time.monotonic()
    with out.phase("quantizing"):
        for event in execute_folder(job, threads=threads):
            if not isinstance(event, Finished):
                out.event(event)
                continue
            finished = event
    source = sum(info.nbytes for info in job.model.store.tensors.values())
    out.say(
        f"{size_text(source)} became {size_text(finished.nbytes)} at "
        f"{finished.bits_per_weight:.2f} bits per weight ({job.plan.label}) "
        f"in {duration_text(time.monotonic() - start)}"
    )
    if out.json:
        out.document(
            "quantize",
            1,
            {
                "paths": [str(job.path)],
                "to": job.plan.recipe.to,
                "type": job.plan.label,
                "bytes": finished.nbytes,
                "bits_per_weight": finished.bits_per_weight,
                "source_bytes": source,
                "source_digest": finished.source_digest,
            },
        )
        return
    out.result(job.path)
