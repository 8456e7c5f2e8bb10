"""The calibrated part of a quantization: choose types, transform the model, round its tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from quantcli.artifacts.gguf_file import GgufFile, add_metadata
from quantcli.artifacts.model_folder import ModelFolder
from quantcli.artifacts.prepare import prepare_artifact
from quantcli.artifacts.staging import own_folder
from quantcli.artifacts.write import default_threads
from quantcli.events import Events, in_phase
from quantcli.layerwise.texts import read_texts
from quantcli.model import Model
from quantcli.plan.allocate import Costs
from quantcli.plan.recipe import Recipe, is_allocated, value_of
from quantcli.plan.recipe_defaults import USUAL_ROUNDER
from quantcli.plan.schemes import GGUF
from quantcli.rounding.options import Options
from quantcli.run.allocation_targets import Candidates, find_target
from quantcli.run.calibrate import states_memory
from quantcli.run.calibrated_run import (
    CalibratedRun,
    Rounding,
    begin_rounding,
    costs_folder,
    plan_passes,
    prepare_run,
    remove_costs,
    round_tensors,
)
from quantcli.run.choose_types import choose_types
from quantcli.run.find_transforms import find_transforms
from quantcli.run.methods import parse_methods
from quantcli.run.outputs import Planned
from quantcli.run.recipe_options import read_options
from quantcli.run.request import Request
from quantcli.run.static_scales import calibrate_scales
from quantcli.run.type_costs import measure_type_costs
from quantcli.transforms.transformed_checkpoint import as_checkpoint, note_copies


def plan_methods(request: Request, model: Model, recipe: Recipe) -> CalibratedRun:
    """Read the texts and cut them into windows."""
    texts = read_texts(list(request.texts))
    share = value_of(recipe, "random_share")
    return prepare_run(model, texts, chunks=request.chunks, random_share=share)


def apply_methods(
    request: Request, planned: Planned, run: CalibratedRun, begun: list[Rounding]
) -> Events[Planned]:
    """The output as the recipe's methods leave it, its weights not yet written.

    A rounding that began is added to ``begun``, whose `Rounding.finish` or `Rounding.abandon` the
    caller calls.
    """
    artifact, path = planned.artifact, planned.path
    recipe = artifact.plan.recipe
    chain = parse_methods(recipe.method or USUAL_ROUNDER)
    options = read_options(recipe)
    memory, threads = states_memory(), request.threads or default_threads()
    gradients: Path | None = None
    if is_allocated(recipe):
        target = find_target(run.model, artifact, path, run.importance)

        def measure(candidates: Candidates) -> Events[Costs]:
            return _measure_costs(run, path, candidates, options, memory, threads)

        choice = choose_types(target, measure)
        artifact = yield from in_phase(f"choosing {target.noun}s", choice)
        # Those of a transformed model are others.
        if not chain.transforms and costs_folder(path).exists():
            gradients = costs_folder(path)
    if chain.transforms:
        search = find_transforms(
            run, chain, artifact.plan, path, max_memory=memory, threads=threads
        )
        moved, importance = yield from in_phase("transforming", search)
        run = run.with_model(moved if recipe.to == GGUF else as_checkpoint(moved))
        artifact = prepare_artifact(
            run.model, artifact.plan.recipe, path, importance=importance or run.importance,
            force=request.force,
        )  # fmt: skip
        if isinstance(artifact, ModelFolder):
            yield from note_copies(run.model, artifact.plan)
    if isinstance(artifact, ModelFolder) and artifact.plan.needs_text and artifact.scales is None:
        found = calibrate_scales(run, artifact, max_memory=memory, threads=threads)
        artifact = yield from in_phase("finding static scales", found)
    if not chain.rounds:
        return replace(planned, artifact=artifact)
    rounding = begin_rounding(
        run, artifact.plan, path, options, max_memory=memory, threads=threads,
        resume=request.resume, force=request.force, gradients=gradients,
    )  # fmt: skip
    begun.append(rounding)
    yield from in_phase("rounding", round_tensors(rounding))
    trained = rounding.store.trained
    if trained is not None and isinstance(artifact, GgufFile):
        artifact = add_metadata(artifact, trained.gain.keys)
    return replace(planned, artifact=artifact, rounding=rounding)


def _measure_costs(
    run: CalibratedRun, output: Path, candidates: Candidates, options: Options, max_memory: int,
    threads: int,
) -> Events[Costs]:  # fmt: skip
    """By running the model; what was measured stays in `costs_folder` for a second call."""
    folder = costs_folder(output)
    own_folder(folder, empty=False)
    passes = plan_passes(run, folder, None, None, max_memory, threads)
    try:
        return (yield from measure_type_costs(passes, candidates, options))
    except BaseException:
        remove_costs(output)
        raise
