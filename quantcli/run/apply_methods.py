"""The calibrated part of a quantization: choose types, transform the model, round its tensors."""

from __future__ import annotations

from dataclasses import replace

from quantcli.artifacts.gguf_file import GgufFile, add_metadata
from quantcli.artifacts.model_folder import ModelFolder
from quantcli.artifacts.prepare import prepare_artifact
from quantcli.artifacts.write import default_threads
from quantcli.events import Events, in_phase
from quantcli.layerwise.texts import read_texts
from quantcli.model import Model
from quantcli.plan.recipe import Recipe, value_of
from quantcli.plan.recipe_defaults import USUAL_ROUNDER
from quantcli.plan.schemes import GGUF
from quantcli.run.calibrate import states_memory
from quantcli.run.calibrated_run import (
    CalibratedRun,
    Rounding,
    begin_rounding,
    costs_folder,
    prepare_run,
    round_tensors,
)
from quantcli.run.choose_types import choose_types
from quantcli.run.find_transforms import find_transforms
from quantcli.run.methods import parse_methods
from quantcli.run.outputs import Planned
from quantcli.run.recipe_options import read_options
from quantcli.run.request import Request
from quantcli.run.static_scales import calibrate_scales
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
    gradients = None
    if isinstance(artifact, GgufFile) and (recipe.allocate or recipe.target_size):
        choice = choose_types(run, artifact, path, options, max_memory=memory, threads=threads)
        artifact = yield from in_phase("choosing types", choice)
        # Those of a transformed model are others.
        gradients = None if chain.transforms else costs_folder(path)
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
