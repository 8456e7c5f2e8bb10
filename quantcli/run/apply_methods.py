"""The calibrated part of a quantization: choose types, transform the model, round its tensors."""

from __future__ import annotations

from pathlib import Path

from quantcli.artifacts.gguf_file import GgufFile, add_metadata
from quantcli.artifacts.model_folder import ModelFolder
from quantcli.artifacts.prepare import prepare_artifact
from quantcli.artifacts.write import default_threads, threads_within
from quantcli.events import Events, in_phase
from quantcli.layerwise.texts import read_texts
from quantcli.model import Model
from quantcli.plan.recipe import Recipe, value_of
from quantcli.plan.schemes import GGUF
from quantcli.rounding.options import USUAL_ROUNDER
from quantcli.run.calibrate import states_memory
from quantcli.run.choose_types import choose_types
from quantcli.run.find_transforms import find_transforms
from quantcli.run.method_run import (
    Rounding,
    begin_rounding,
    prepare_run,
    round_tensors,
    survey_folder,
)
from quantcli.run.methods import parse_methods
from quantcli.run.quantize import Ready
from quantcli.run.recipe_options import read_options
from quantcli.run.request import Request
from quantcli.sources.imatrix import Importance
from quantcli.transforms.transformed_checkpoint import as_checkpoint, note_copies


def apply_methods(
    request: Request, model: Model, recipe: Recipe, path: Path, begun: list[Rounding]
) -> Events[Ready]:
    """The output as the recipe's methods leave it, its weights not yet written.

    A rounding that began is added to ``begun``, whose `Rounding.finish` or `Rounding.abandon` the
    caller calls. A dry run plans alone.
    """
    chain = parse_methods(recipe.method or USUAL_ROUNDER)
    share = value_of(recipe, "random_share")
    texts = read_texts(list(request.texts))
    planned = prepare_run(model, texts, chunks=request.chunks, random_share=share)
    memory, threads = states_memory(), request.threads or default_threads()

    def plan(model: Model, recipe: Recipe, importance: Importance) -> GgufFile | ModelFolder:
        return prepare_artifact(
            model, recipe, path, importance=importance, force=request.force,
            check=not request.dry_run,
        )  # fmt: skip

    artifact = plan(model, recipe, planned.importance)
    workers = threads_within(artifact, request.threads, request.max_memory)
    if request.dry_run:
        return Ready(artifact, workers)
    gradients = None
    if isinstance(artifact, GgufFile) and (recipe.allocate or recipe.target_size):
        choice = choose_types(
            planned, artifact, path, read_options(recipe), max_memory=memory, threads=threads
        )
        artifact = yield from in_phase("choosing types", choice)
        # Those of a transformed model are others.
        gradients = None if chain.transforms else survey_folder(path)
    if chain.transforms:
        search = find_transforms(
            planned, chain, artifact.plan, path, max_memory=memory, threads=threads
        )
        moved, importance = yield from in_phase("transforming", search)
        planned = planned.with_model(moved if recipe.to == GGUF else as_checkpoint(moved))
        artifact = plan(planned.model, artifact.plan.recipe, importance or planned.importance)
        if isinstance(artifact, ModelFolder):
            yield from note_copies(planned.model, artifact.plan)
    if not chain.rounds:
        return Ready(artifact, workers)
    rounding = begin_rounding(
        planned, artifact.plan, path, read_options(recipe), max_memory=memory, threads=threads,
        resume=request.resume, force=request.force, gradients=gradients,
    )  # fmt: skip
    begun.append(rounding)
    yield from in_phase("rounding", round_tensors(rounding))
    trained = rounding.store.trained
    if trained is not None and isinstance(artifact, GgufFile):
        artifact = add_metadata(artifact, trained.gain.keys)
    return Ready(artifact, workers, rounding)
