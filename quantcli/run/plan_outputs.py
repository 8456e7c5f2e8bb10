"""Every output planned: its place, its recipe, what it will take; no weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.archs.towers import CLIP
from quantcli.artifacts.atomic import refuse_parent
from quantcli.artifacts.gguf_file import GgufFile
from quantcli.artifacts.prepare import default_output, prepare_artifact
from quantcli.artifacts.scratch_place import check_scratch
from quantcli.artifacts.shared_reads import reads_are_shared, shared_bytes, slab_readers
from quantcli.artifacts.staging import held_bytes, output_error
from quantcli.artifacts.stream import STREAM
from quantcli.artifacts.write import count_fitting, peak_memory, threads_within
from quantcli.errors import OutputError, PlanError
from quantcli.model import Model, for_gguf, tower_of
from quantcli.plan.recipe import Recipe, merge_recipe, value_of
from quantcli.plan.recipe_defaults import USUAL_ROUNDER
from quantcli.plan.schemes import GGUF
from quantcli.run.bias_means import take_means
from quantcli.run.check_needs import check_room
from quantcli.run.drop_mtp import drop_mtp
from quantcli.run.forecast import add_forecasts
from quantcli.run.outputs import Planned, needs_text
from quantcli.run.request import Request, Wanted, takes_importance
from quantcli.run.set_journal import SetJournal
from quantcli.sources.imatrix import Importance

if TYPE_CHECKING:
    from quantcli.artifacts.model_folder import ModelFolder
    from quantcli.run.calibrated_run import CalibratedRun


@dataclass(frozen=True)
class Placed:
    """An output with the model that it is made of, its recipe for it, and its path."""

    model: Model
    recipe: Recipe
    path: Path


def place_all(request: Request, model: Model) -> list[Placed]:
    """The outputs of a request in turn."""
    recipes = [wanted.recipe for wanted in request.outputs]
    # One model for all outputs that take the same, as these share what they read.
    models = {(False, False): model}
    folders_too = any(recipe.to != GGUF for recipe in recipes)
    found = []
    for wanted in request.outputs:
        kind = (folders_too and wanted.recipe.to == GGUF, wanted.recipe.no_mtp)
        if kind not in models:
            own = for_gguf(model) if kind[0] else model
            models[kind] = drop_mtp(own) if kind[1] else own
        found.append(_place(models[kind], wanted))
    return found


def _place(model: Model, wanted: Wanted) -> Placed:
    recipe = wanted.recipe
    if recipe.mmproj_only and model.arch != CLIP:
        model = tower_of(model)
    if wanted.bits == 16 and _all_float16(model):
        recipe = merge_recipe(recipe, type="F16")
    name = Path(wanted.name) if wanted.name else default_output(model, recipe)
    path = wanted.path or (wanted.folder or Path()) / name
    return Placed(model, recipe, path)


def _all_float16(model: Model) -> bool:
    """Whether every matrix is stored in float16, from which bfloat16 would take three bits."""
    return {tensor.dtype for tensor in model.tensors if len(tensor.shape) > 1} == {"F16"}


def plan_all(
    request: Request, placed: Sequence[Placed], known: Mapping[str, Importance],
    matrix: Path | None, journal: SetJournal | None,
) -> list[Planned]:  # fmt: skip
    """Decide everything about all outputs; PlanError, OutputError or UsageError.

    ``known`` are the importance matrices by their files; ``matrix`` is the one that the texts will
    make.
    """
    runs: dict[tuple[int, float, float], CalibratedRun] = {}
    planned = [_plan(request, each, known, matrix, journal, runs) for each in placed]
    if request.max_memory is not None:
        planned = _fit_together(planned, request.max_memory)
    if request.scratch is not None:
        check_scratch(request.scratch)
    planned = add_forecasts(request, planned)
    if not request.dry_run:
        check_room(request, planned, [held_bytes(each.artifact.paths) for each in planned])
    return planned


def _plan(
    request: Request, placed: Placed, known: Mapping[str, Importance], matrix: Path | None,
    journal: SetJournal | None, runs: dict[tuple[int, float, float], CalibratedRun],
) -> Planned:  # fmt: skip
    model, recipe, path = placed.model, placed.recipe, placed.path
    run, importance = None, known.get(recipe.imatrix or "")
    if recipe.method is not None:
        from quantcli.run.apply_methods import plan_methods

        # Outputs of one model and the same windows cut the texts once.
        key = id(model), value_of(recipe, "random_share"), value_of(recipe, "sample_share")
        run = runs[key] = runs.get(key) or plan_methods(request, model, recipe)
        importance = run.importance
    elif matrix is not None and not recipe.mmproj_only and takes_importance(recipe):
        recipe = merge_recipe(recipe, imatrix=str(matrix))
        importance = known.get(str(matrix))
        if importance is None:
            from quantcli.run.calibrated_run import expected_importance

            importance = expected_importance(model)
    kept = None
    if journal is not None and journal.is_whole(path):
        kept = journal.digest_of(path)
    try:
        artifact = prepare_artifact(
            model, recipe, path, importance=importance, force=request.force,
            check=kept is None and not request.dry_run,
        )  # fmt: skip
    except OutputError as refused:
        if journal is not None and journal.path.is_file() and path.exists():
            hint = "--resume makes what is left of an interrupted set, --force replaces it"
            raise OutputError(refused.message, hint=hint) from refused
        raise
    except PlanError as refused:
        if request.is_set:
            label = recipe.type if recipe.to == GGUF else recipe.to
            raise PlanError(f"{label}: {refused.message}", hint=refused.hint) from refused
        raise
    if isinstance(artifact, GgufFile):
        artifact = take_means(artifact)
    if recipe.statistics is not None and needs_text(artifact):
        from quantcli.run.static_scales import take_scales

        artifact = take_scales(artifact, Path(recipe.statistics))
    asked = artifact, request.threads, request.max_memory
    # A run of the model needs more than the writing, and its forecast refuses.
    threads = threads_within(*asked) if run is None else max(1, count_fitting(*asked))
    in_place = run is not None and _goes_in_place(request, artifact)
    return Planned(artifact, path, threads, run, kept=kept, in_place=in_place)


def _goes_in_place(request: Request, artifact: GgufFile | ModelFolder) -> bool:
    """Whether what a method rounds goes to its place in the output's files at once.

    Not by several processes, which lay out one file together when all is rounded; nor where
    training end to end changes factors of it and adds to the header what it gained, or where the
    bytes are other ones than a layer ends with, as a model folder's are.
    """
    from quantcli.run.methods import parse_methods
    from quantcli.run.recipe_options import read_options

    recipe = artifact.plan.recipe
    if request.share is not None or recipe.to != GGUF or artifact.paths == (STREAM,):
        return False
    chain = parse_methods(recipe.method or USUAL_ROUNDER)
    return chain.rounds and not read_options(recipe).e2e


def _fit_together(planned: Sequence[Planned], max_memory: int) -> list[Planned]:
    """The outputs on as few threads as leave room for what they hold to read it once together.

    PlanError where one thread needs more than ``max_memory`` bytes with it.
    """
    artifacts = [each.artifact for each in planned if each.kept is None]
    if not artifacts or not reads_are_shared(artifacts):
        return list(planned)
    model = artifacts[0].model
    threads = min(each.threads for each in planned if each.kept is None)
    while True:
        held = shared_bytes(model.store, slab_readers(threads, remote=model.is_remote))
        needed = held + max(peak_memory(artifact, threads) for artifact in artifacts)
        if needed <= max_memory:
            return [replace(each, threads=threads) for each in planned]
        if threads == 1:
            raise PlanError(
                f"{model.label} needs up to {needed:,} bytes of memory for these outputs even on "
                f"one thread, more than the {max_memory:,} allowed",
                hint=f"--max-memory {-(-needed // 10**6)}M is enough; one output at a time needs "
                "less",
            )
        threads -= 1


@contextmanager
def own_folders(request: Request) -> Iterator[None]:
    """Make the folders that outputs are to go into; those that stay empty are removed again."""
    made = []
    if not request.dry_run:
        for folder in dict.fromkeys(w.folder for w in request.outputs if w.folder is not None):
            if folder.exists():
                continue
            refuse_parent(folder.absolute().parent)
            try:
                # Other processes may make the same outputs.
                folder.mkdir(exist_ok=True)
            except OSError as error:
                raise output_error(folder, error) from error
            made.append(folder)
    try:
        yield
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
