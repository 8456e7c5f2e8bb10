"""``quantize`` to GGUF: the run that makes the file, and how it is shown."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.cli.methods import (
    Calibrating,
    allocate_beside,
    finish,
    plan_run,
    round_beside,
    transform_beside,
)
from quantcli.cli.running import calibrate_beside

if TYPE_CHECKING:
    from quantcli.artifacts.gguf_file import GgufFile
    from quantcli.cli.output import Output
    from quantcli.plan.recipe import Recipe
    from quantcli.run.job import Encoding, MethodJob


def make_gguf(
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
    """Plan the file, and make it unless this is a dry run."""
    from quantcli.artifacts.atomic import refuse_existing
    from quantcli.artifacts.gguf_file import prepare_gguf
    from quantcli.artifacts.prepare import default_output
    from quantcli.artifacts.write import threads_within
    from quantcli.model import open_model
    from quantcli.plan.recipe import merge_recipe
    from quantcli.sources.imatrix import read_importance
    from quantcli.types import Note

    importance = read_importance(Path(recipe.imatrix)) if recipe.imatrix else None
    with open_model(target, pre=recipe.pre, on_progress=out.event) as model:
        path = output or default_output(model, recipe)
        planned = plan_run(model, recipe, told) if recipe.method else None
        if planned is not None:
            importance = planned.importance
        elif told.data:
            # What would stop the quantization afterwards stops it before the long run.
            refuse_existing([path], force=force)
            made = calibrate_beside(
                out, model, list(told.data), path,
                chunks=told.chunks, force=force, threads=threads,
            )  # fmt: skip
            recipe = merge_recipe(recipe, imatrix=str(made))
            importance = read_importance(made)
        job = prepare_gguf(
            model, recipe, path, importance=importance, force=force, check=not dry_run
        )
        workers = threads_within(job, threads, limit)
        if dry_run:
            if recipe.allocate or recipe.target_size:
                note = f"types are chosen as it runs; until then these are {recipe.type}'s"
                out.event(Note(note))
            _show_plan(out, job, workers)
        elif planned is None or recipe.method is None:
            _execute(out, job, workers)
        else:
            _run_method(out, planned, job, told, recipe.method, workers, threads)


def _run_method(
    out: Output, planned: MethodJob, job: GgufFile, told: Calibrating, method: str, workers: int,
    threads: int | None,
) -> None:  # fmt: skip
    """Transform, then round with feedback or, where no method rounds, with importance alone."""
    from quantcli.artifacts.gguf_file import add_metadata, prepare_gguf
    from quantcli.run.choose_types import remove_survey, survey_folder
    from quantcli.run.methods import parse_methods

    chain = parse_methods(method)
    path = job.paths[0]
    recipe, gradients = job.plan.recipe, None
    if recipe.allocate or recipe.target_size:
        job = allocate_beside(out, planned, job, path, threads=threads)
        gradients = None if chain.transforms else survey_folder(path)
    if chain.transforms:
        moved = transform_beside(out, planned, chain, job.plan, job.paths[0], threads=threads)
        planned = planned.of(moved.model)
        importance = moved.importance or planned.importance
        job = prepare_gguf(
            moved.model, job.plan.recipe, job.paths[0], importance=importance, force=job.force
        )
    if not chain.rounds:
        _execute(out, job, workers)
        return
    encoding = round_beside(
        out, planned, job.plan, path, told, force=job.force, threads=threads, gradients=gradients
    )
    if encoding.store.trained is not None:
        job = add_metadata(job, encoding.store.trained.gain.keys)
    _execute(out, job, workers, encoding)
    finish(encoding)
    remove_survey(path)


def _show_plan(out: Output, job: GgufFile, threads: int) -> None:
    from quantcli.report.plans import plan_document, plan_tables

    for note in job.plan.notes:
        out.event(note)
    if out.json:
        out.document("plan", 1, plan_document(job, threads))
        return
    for table in plan_tables(job, threads):
        out.table(table)


def _execute(out: Output, job: GgufFile, threads: int, encoding: Encoding | None = None) -> None:
    from quantcli.artifacts.gguf_file import take_encoded
    from quantcli.artifacts.write import Finished, write_artifact
    from quantcli.report.units import duration_text, size_text

    start = time.monotonic()
    with out.phase("quantizing"):
        artifact = job if encoding is None else take_encoded(job, encoding.store)
        for event in write_artifact(artifact, threads=threads):
            if not isinstance(event, Finished):
                out.event(event)
                continue
            finished = event
    source = sum(job.model.stored_bytes(item.tensor) for item in job.plan.items)
    out.say(
        f"{size_text(source)} became {size_text(finished.nbytes)} at "
        f"{finished.bits_per_weight:.2f} bits per weight ({job.plan.recipe.type}) "
        f"in {duration_text(time.monotonic() - start)}"
    )
    if out.json:
        fields: dict[str, Any] = {
            "paths": [str(path) for path in finished.paths],
            "type": job.plan.recipe.type,
            "bytes": finished.nbytes,
            "bits_per_weight": finished.bits_per_weight,
            "source_bytes": source,
            "source_digest": finished.source_digest,
        }
        if encoding is not None:
            from quantcli.run.job import outcome_rows

            fields["tensors"] = outcome_rows(encoding.store.outcomes)
            if encoding.store.trained is not None:
                fields["end_to_end"] = encoding.store.trained.gain.fields
        out.document("quantize", 1, fields)
        return
    for path in finished.paths:
        out.result(path)
