"""A calibrated method inside ``quantize``: run the model, round layer by layer, then write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantcli.cli.options import thread_count
from quantcli.cli.running import default_memory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from quantcli.artifacts.gguf_file import GgufFile
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


def plan_run(model: Model, recipe: Recipe, told: Calibrating) -> MethodJob:
    """Read and cut the texts that the model will be run on."""
    from quantcli.layerwise.require_torch import require_torch

    require_torch()
    from quantcli.layerwise.texts import read_texts
    from quantcli.plan.recipe import value_of
    from quantcli.run.job import prepare

    share = value_of(recipe, "random_share")
    return prepare(model, read_texts(list(told.data)), chunks=told.chunks, random_share=share)


def allocate_beside(
    out: Output, planned: MethodJob, job: GgufFile, path: Path, *, threads: int | None
) -> GgufFile:
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
