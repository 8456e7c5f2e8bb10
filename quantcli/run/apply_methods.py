"""The calibrated part of a quantization: choose types, transform the model, round its tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from quantcli.artifacts.gguf_file import GgufFile, add_metadata, hold_output
from quantcli.artifacts.held_output import HeldOutput
from quantcli.artifacts.model_folder import ModelFolder
from quantcli.artifacts.prepare import prepare_artifact
from quantcli.artifacts.scratch_place import work_path
from quantcli.artifacts.write import default_threads
from quantcli.events import Events, in_phase
from quantcli.layerwise.texts import read_texts
from quantcli.model import Model
from quantcli.plan.allocate import Costs
from quantcli.plan.recipe import Recipe, is_allocated, value_of
from quantcli.plan.recipe_defaults import USUAL_ROUNDER
from quantcli.plan.schemes import GGUF
from quantcli.rounding.run_store import EncodedStore
from quantcli.run.allocation_targets import Candidates, find_target
from quantcli.run.calibrate import states_memory
from quantcli.run.calibrated_run import (
    CalibratedRun,
    Rounding,
    begin_rounding,
    costs_folder,
    prepare_run,
    remove_costs,
    round_tensors,
)
from quantcli.run.choose_types import choose_types
from quantcli.run.find_transforms import find_transforms
from quantcli.run.measure_costs import measure_costs
from quantcli.run.methods import parse_methods
from quantcli.run.outputs import Planned
from quantcli.run.recipe_options import read_options
from quantcli.run.request import Request
from quantcli.run.static_scales import calibrate_scales
from quantcli.run.survey import Survey
from quantcli.run.text_statistics import TextStatistics, text_statistics
from quantcli.transforms.transformed_checkpoint import as_checkpoint, note_copies


def plan_methods(request: Request, model: Model, recipe: Recipe) -> CalibratedRun:
    """Read the texts and cut them into windows."""
    texts = read_texts(list(request.texts))
    return prepare_run(
        model, texts, chunks=request.chunks, random_share=value_of(recipe, "random_share"),
        sample_share=value_of(recipe, "sample_share"),
    )  # fmt: skip


def group_runs(planned: Iterable[Planned]) -> list[list[Planned]]:
    """Outputs with methods, those that one run of the model serves together.

    Not those of which the model is transformed first, each in its own way, or whose layers are run
    as they were quantized.
    """
    groups: dict[Hashable, list[Planned]] = {}
    for number, each in enumerate(planned):
        recipe = each.artifact.plan.recipe
        chain, options = parse_methods(recipe.method or USUAL_ROUNDER), read_options(recipe)
        key: Hashable = number
        if chain.rounds and not chain.transforms and not options.propagate and each.run is not None:
            shares = value_of(recipe, "random_share"), value_of(recipe, "sample_share")
            key = (options, *shares, id(each.run.model))
        groups.setdefault(key, []).append(each)
    return list(groups.values())


def statistics_beside(request: Request, output: Path) -> AbstractContextManager[TextStatistics]:
    """What `apply_methods` measures for the outputs of a run, next to the first one."""
    memory, threads = states_memory(), request.threads or default_threads()
    if request.max_memory is not None:
        memory = 0
    work = work_path(output, request.scratch)
    return text_statistics(work, max_memory=memory, threads=threads, device=request.device)


def apply_methods(
    request: Request, batch: Sequence[Planned], statistics: TextStatistics, begun: list[Rounding]
) -> Events[list[Planned]]:
    """The outputs of one of `group_runs` as their methods leave them, weights not yet written.

    ``statistics`` are measured for all batches of a run. A rounding that began is added to
    ``begun``, whose `Rounding.finish` or `Rounding.abandon` the caller calls.
    """
    first = batch[0].artifact.plan.recipe
    chain, options = parse_methods(first.method or USUAL_ROUNDER), read_options(first)
    memory = states_memory() if batch[0].states_in_memory else 0
    threads = request.threads or default_threads()
    gradients: Path | None = None
    original, output = _run_of(batch[0]), work_path(batch[0].path, request.scratch)

    def measure(candidates: Candidates) -> Events[Costs]:
        return measure_costs(
            original, output, candidates, options, max_memory=memory, threads=threads,
            device=request.device,
        )  # fmt: skip

    targets = {
        each.path: find_target(
            original.model, each.artifact, each.path, original.importance, check=each.kept is None
        )
        for each in batch
        if is_allocated(each.artifact.plan.recipe)
    }
    survey = Survey(list(targets.values()), measure)
    ready = []
    for each in batch:
        run, artifact, path = _run_of(each), each.artifact, each.path
        recipe = artifact.plan.recipe
        if path in targets:
            target = targets[path]
            choice = choose_types(target, survey.costs)
            artifact = yield from in_phase(f"choosing {target.noun}s", choice)
        if chain.transforms:
            search = find_transforms(run, chain, artifact.plan, statistics, threads=threads)
            moved, importance = yield from in_phase("transforming", search)
            run = run.with_model(moved if recipe.to == GGUF else as_checkpoint(moved))
            artifact = prepare_artifact(
                run.model, artifact.plan.recipe, path, importance=importance or run.importance,
                force=request.force,
            )  # fmt: skip
            if isinstance(artifact, ModelFolder):
                yield from note_copies(run.model, artifact.plan)
        if (
            isinstance(artifact, ModelFolder)
            and artifact.plan.needs_text
            and artifact.scales is None
        ):
            found = calibrate_scales(run, artifact, statistics)
            artifact = yield from in_phase("finding static scales", found)
        ready.append(replace(each, artifact=artifact, run=run))
    # Those of a transformed model are others.
    if targets and not chain.transforms and costs_folder(output).exists():
        gradients = costs_folder(output)
    if not chain.rounds:
        remove_costs(output)
        return ready
    rounding = begin_rounding(
        _run_of(ready[0]), [each.artifact.plan for each in ready], output, options,
        max_memory=memory, threads=threads, resume=request.resume, force=request.force,
        gradients=gradients, device=request.device, held=[_held(each) for each in ready],
    )  # fmt: skip
    begun.append(rounding)
    yield from in_phase("rounding", round_tensors(rounding))
    return [
        replace(each, artifact=_with_gain(each.artifact, store), store=store)
        for each, store in zip(ready, rounding.stores, strict=True)
    ]


def _held(planned: Planned) -> HeldOutput | None:
    """The output's files, where what is rounded goes into them at once."""
    if not planned.in_place or not isinstance(planned.artifact, GgufFile):
        return None
    return hold_output(planned.artifact, whole=planned.kept is not None)


def _run_of(planned: Planned) -> CalibratedRun:
    if planned.run is None:
        raise ValueError(f"{planned.path} has no method")
    return planned.run


def _with_gain(artifact: GgufFile | ModelFolder, store: EncodedStore) -> GgufFile | ModelFolder:
    """The file with what training gained, if it was trained."""
    if store.trained is None or not isinstance(artifact, GgufFile):
        return artifact
    return add_metadata(artifact, store.trained.gain.keys)
