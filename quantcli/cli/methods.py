"""A calibrated method inside ``quantize``: run the model, round layer by layer, then write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantcli.cli.options import thread_count
from quantcli.cli.running import default_memory
from quantcli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from quantcli.artifacts.gguf_file import Job
    from quantcli.cli.output import Output
    from quantcli.model import Model
    from quantcli.plan.folders import FolderPlan
    from quantcli.plan.planner import Plan
    from quantcli.plan.recipe import Recipe
    from quantcli.rounding.options import Outcome
    from quantcli.run.find_transforms import Moved
    from quantcli.run.job import Encoding, MethodJob
    from quantcli.run.methods import Chain


@dataclass(frozen=True)
class Calibrating:
    """What ``quantize`` was told about the run of the model."""

    data: Sequence[str]
    chunks: int | None = None
    resume: bool = False


BEST = "best"


def settle_method(recipe: Recipe, quality: str | None) -> Recipe:
    """The recipe with "best", or what ``--quality high`` means, replaced by the methods' names."""
    from quantcli.plan.recipe import merge_recipe

    if quality not in (None, "fast", "high"):
        raise UsageError(f"there is no quality {quality!r}", hint="fast or high")
    method = recipe.method
    if method is None and quality == "high":
        method = BEST
    if method is None or method.strip().lower() != BEST:
        return recipe
    from quantcli.run.methods import ROUNDER

    # Choosing types gave more than any training did, and keeps the size.
    return merge_recipe(recipe, method=ROUNDER, allocate=recipe.to == "gguf" or None)


def check_options(recipe: Recipe, told: Calibrating) -> None:
    """UsageError where an option of a method stands without one, or two contradict each other."""
    if told.chunks is not None and recipe.method is None and not told.data:
        raise UsageError("--chunks cuts a text to run", hint="add --calibrate TEXT")
    if recipe.method is None:
        given = {
            "--damping": recipe.damping, "--column-order": recipe.column_order,
            "--sweeps": recipe.sweeps, "--fisher-windows": recipe.fisher_windows,
            "--random-share": recipe.random_share,
            "--propagate": recipe.propagate or None, "--tune-steps": recipe.tune_steps,
            "--allocate": recipe.allocate or None, "--target-size": recipe.target_size,
            "--tune": recipe.tune, "--e2e-steps": recipe.e2e_steps,
            "--resume": told.resume or None,
        }  # fmt: skip
        for name, value in given.items():
            if value is not None:
                raise UsageError(f"{name} belongs to a method", hint="add --method gptq")
        return
    from quantcli.run.methods import parse_methods
    from quantcli.run.recipe_options import check_methods

    chain = parse_methods(recipe.method)
    if told.resume and not chain.rounds:
        raise UsageError(
            f"--method {recipe.method} leaves nothing to resume", hint="run it again without"
        )
    check_methods(recipe)


def plan_run(model: Model, recipe: Recipe, told: Calibrating) -> MethodJob:
    """Read and cut the texts that the model will be run on."""
    from quantcli.layerwise.require_torch import require_torch

    require_torch()
    from quantcli.layerwise.random_windows import SHARE
    from quantcli.layerwise.texts import read_texts
    from quantcli.run.job import prepare

    share = SHARE if recipe.random_share is None else recipe.random_share
    return prepare(model, read_texts(list(told.data)), chunks=told.chunks, random_share=share)


def allocate_beside(
    out: Output, planned: MethodJob, job: Job, path: Path, *, threads: int | None
) -> Job:
    """The same job with the types that cost least within the size, every tensor by name."""
    from quantcli.run.choose_types import Allocated, allocate_job
    from quantcli.run.recipe_options import read_options

    with out.phase("choosing types"):
        for event in allocate_job(
            planned, job, path, read_options(job.plan.recipe),
            max_memory=default_memory(), threads=thread_count(threads),
        ):  # fmt: skip
            if isinstance(event, Allocated):
                return event.job
            out.event(event)
    raise RuntimeError("the choice of types ended without a result")


def transform_beside(
    out: Output, planned: MethodJob, chain: Chain, plan: Plan | FolderPlan, path: Path, *,
    threads: int | None,
) -> Moved:  # fmt: skip
    """Find the transforms; the model with them."""
    from quantcli.run.find_transforms import Moved, find_transforms
    from quantcli.transforms.scale_search import TransformFound

    with out.phase("transforming"):
        for event in find_transforms(
            planned, chain, plan, path, max_memory=default_memory(),
            threads=thread_count(threads),
        ):  # fmt: skip
            if isinstance(event, Moved):
                return event
            if isinstance(event, TransformFound):
                for group in event.outcomes:
                    kept = group.choice or "left as it is"
                    out.detail(
                        f"{group.group}: loss {group.before:.3g} -> {group.after:.3g}, {kept}"
                    )
            else:
                out.event(event)
    raise RuntimeError("the search for transforms ended without a result")


def round_beside(
    out: Output, planned: MethodJob, plan: Plan | FolderPlan, path: Path, told: Calibrating, *,
    force: bool, threads: int | None, gradients: Path | None = None,
) -> Encoding:  # fmt: skip
    """Round every tensor; when it ends early, say what is kept and how to go on.

    ``gradients`` is a folder where a survey left those of this model.
    """
    from quantcli.rounding.options import Outcome
    from quantcli.run.choose_types import remove_survey
    from quantcli.run.job import begin, rounded
    from quantcli.run.recipe_options import read_options

    encoding = begin(
        planned, plan, path, read_options(plan.recipe),
        max_memory=default_memory(), threads=thread_count(threads), resume=told.resume,
        force=force, gradients=gradients,
    )  # fmt: skip
    with out.phase("rounding"):
        try:
            for event in rounded(encoding):
                if isinstance(event, Outcome):
                    out.detail(_sentence(event))
                else:
                    out.event(event)
        except BaseException:
            encoding.store.close()
            if encoding.checkpoint.done:
                out.close()
                out.warn(
                    f"{encoding.checkpoint.done} layers are done and kept in "
                    f"{encoding.checkpoint.folder}; the same command with --resume continues"
                )
            else:
                encoding.checkpoint.remove()
                if gradients is not None:
                    remove_survey(path)
            raise
    return encoding


def _sentence(outcome: Outcome) -> str:
    kept = f", {outcome.kept} kept" if outcome.kept else ""
    return (
        f"{outcome.tensor} {outcome.format}: held-out loss {outcome.before:.3g} -> "
        f"{outcome.after:.3g}{kept}"
    )


def finish(encoding: Encoding) -> None:
    """The output is whole: the run's folder goes."""
    encoding.store.close()
    encoding.checkpoint.remove()
