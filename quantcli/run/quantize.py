"""The one sequence of a quantization: open, plan, calibrate, choose types, transform, round, write.

`quantize` yields what happens and returns what was made; the command line and the Python API both
drain it. The model is opened once for all outputs, and weights are written at the end, when
everything else is known of every output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.archs.towers import CLIP, has_tower
from quantcli.artifacts.gguf_file import GgufFile, take_encoded
from quantcli.artifacts.prepare import default_output, prepare_artifact
from quantcli.artifacts.write import ArtifactDone, threads_within, write_artifacts
from quantcli.errors import UsageError
from quantcli.events import Events, in_phase, take_all
from quantcli.layerwise.require_torch import require_torch
from quantcli.model import Model, open_model, open_tower, tower_of
from quantcli.plan.allocate import Costs
from quantcli.plan.recipe import Recipe, is_allocated, merge_recipe
from quantcli.plan.schemes import GGUF
from quantcli.plan.text_file import read_template
from quantcli.run.allocation_targets import Candidates, find_target
from quantcli.run.drop_mtp import drop_mtp
from quantcli.run.outputs import Planned, Quantized
from quantcli.run.request import Request, Wanted, check_request
from quantcli.sources.imatrix import Importance, read_importance
from quantcli.types import Note

if TYPE_CHECKING:
    from quantcli.artifacts.model_folder import ModelFolder
    from quantcli.run.calibrated_run import Rounding


def quantize(
    request: Request, *, on_fetch: Callable[..., None] | None = None
) -> Events[list[Quantized]]:
    """Do what is asked; returns each output in turn.

    ``on_fetch`` takes the progress of a download. Raises a QuantcliError in one sentence for
    whatever is wrong. What ends it early leaves no output, and an existing one untouched; layers
    that were rounded are kept for ``resume``, and the last note says where.
    """
    check_request(request)
    recipes = [wanted.recipe for wanted in request.outputs]
    if request.texts:
        require_torch()
    files = {recipe.imatrix for recipe in recipes if recipe.imatrix}
    known = {file: read_importance(Path(file)) for file in files}
    begun: list[Rounding] = []
    try:
        with _open(request, recipes, on_fetch) as model:
            # One model for all outputs that are without them, as these share what they read.
            bare = drop_mtp(model) if any(recipe.no_mtp for recipe in recipes) else model
            # All that would be refused is refused before any long work begins.
            planned = [
                _plan(request, bare if wanted.recipe.no_mtp else model, wanted, known)
                for wanted in request.outputs
            ]
            yield from _tower_note(model, recipes)
            if request.dry_run:
                return (yield from _show_plans(planned))
            importance = yield from _calibrate(request, model, planned)
            ready = []
            for each in planned:
                ready.append((yield from _make_ready(request, each, importance, begun)))
            done = yield from _write_all(ready)
    except BaseException as stopped:
        kept = [note for rounding in begun for note in rounding.abandon()]
        if not isinstance(stopped, GeneratorExit):
            yield from kept
        raise
    for rounding in begun:
        rounding.finish()
    return done


def _open(
    request: Request, recipes: Sequence[Recipe], on_fetch: Callable[..., None] | None
) -> Model:
    """The text model, or its tower where nothing else is wanted."""
    if all(recipe.mmproj_only for recipe in recipes):
        if request.texts:
            raise UsageError("--calibrate runs the text model, which --mmproj-only leaves out")
        return open_tower(request.source, on_progress=on_fetch)
    return open_model(
        request.source,
        pre=recipes[0].pre,
        vocabulary=bool(request.texts) or any(r.to == GGUF or r.method for r in recipes),
        table=any(r.to == GGUF for r in recipes),
        gguf_only=all(r.to == GGUF for r in recipes),
        ignored=recipes[0].ignore_tensors,
        template=read_template(template) if (template := recipes[0].chat_template) else None,
        on_progress=on_fetch,
    )


def _tower_note(model: Model, recipes: Sequence[Recipe]) -> Iterator[Note]:
    """That a GGUF leaves the tower out, where quantcli could write it."""
    is_wanted = any(recipe.mmproj_only for recipe in recipes)
    if not is_wanted and any(r.to == GGUF for r in recipes) and has_tower(model.config):
        yield Note("the tower beside the text model is left out; --mmproj writes it as well")


def _plan(
    request: Request, model: Model, wanted: Wanted, known: Mapping[str, Importance]
) -> Planned:
    """Decide everything about an output without reading a weight."""
    recipe = wanted.recipe
    if recipe.mmproj_only and model.arch != CLIP:
        model = tower_of(model)
    if wanted.bits == 16 and _all_float16(model):
        recipe = merge_recipe(recipe, type="F16")
    path = wanted.path or (wanted.folder or Path()) / default_output(model, recipe)
    run, importance = None, known.get(recipe.imatrix or "")
    if recipe.method is not None:
        from quantcli.run.apply_methods import plan_methods

        run = plan_methods(request, model, recipe)
        importance = run.importance
    elif request.texts and not recipe.mmproj_only:
        from quantcli.run.calibrated_run import expected_importance

        recipe = merge_recipe(recipe, imatrix=str(calibration_path(path)))
        importance = expected_importance(model)
    artifact = prepare_artifact(
        model, recipe, path, importance=importance, force=request.force, check=not request.dry_run
    )
    threads = threads_within(artifact, request.threads, request.max_memory)
    return Planned(artifact, path, threads, run)


def _all_float16(model: Model) -> bool:
    """Whether every matrix is stored in float16, from which bfloat16 would take three bits."""
    return {tensor.dtype for tensor in model.tensors if len(tensor.shape) > 1} == {"F16"}


def _calibrate(
    request: Request, model: Model, planned: Sequence[Planned]
) -> Events[Importance | None]:
    """The importance matrix of the texts, if an output takes one; it is kept next to the first."""
    takers = [each for each in planned if each.run is None and not each.is_tower]
    if not request.texts or not takers:
        return None
    from quantcli.run.calibrate import calibrate_for

    return (yield from calibrate_for(request, model, calibration_path(takers[0].path)))


def _make_ready(
    request: Request, planned: Planned, importance: Importance | None, begun: list[Rounding]
) -> Events[Planned]:
    """Everything that comes before the weights of one output are written."""
    if planned.run is not None:
        from quantcli.run.apply_methods import apply_methods

        return (yield from apply_methods(request, planned, planned.run, begun))
    if importance is not None and not planned.is_tower:
        artifact = prepare_artifact(
            planned.artifact.model,
            replace(planned.artifact.plan.recipe, imatrix=str(importance.path)),
            planned.path,
            importance=importance,
            force=request.force,
        )
        planned = replace(planned, artifact=artifact)
    if is_allocated(planned.artifact.plan.recipe) and not planned.is_tower:
        return (yield from _choose_by_importance(planned))
    return planned


def _choose_by_importance(planned: Planned) -> Events[Planned]:
    """Types or schemes by an importance matrix, without running the model."""
    from quantcli.run.choose_types import choose_types
    from quantcli.run.importance_costs import measure_importance_costs

    artifact = planned.artifact
    importance = artifact.importance
    if importance is None:
        raise ValueError("nothing tells what types cost")
    target = find_target(artifact.model, artifact, planned.path, importance)

    def measure(candidates: Candidates) -> Events[Costs]:
        return measure_importance_costs(artifact.model, importance, candidates, planned.threads)

    events = in_phase(f"choosing {target.noun}s", choose_types(target, measure))
    return replace(planned, artifact=(yield from events))


def calibration_path(output: Path) -> Path:
    """Where the importance matrix of a quantization to ``output`` is kept, next to it."""
    return output.with_name(f"{output.name.removesuffix('.gguf')}.calib.gguf")


def _show_plans(planned: Sequence[Planned]) -> Events[list[Quantized]]:
    for each in planned:
        yield from each.artifact.plan.notes
        recipe = each.artifact.plan.recipe
        if is_allocated(recipe):
            target = find_target(each.artifact.model, each.artifact, each.path, None, check=False)
            yield Note(
                f"{target.noun}s are chosen as it runs; until then these are {target.label}'s"
            )
    return [Quantized(each.artifact, each.threads) for each in planned]


def _write_all(ready: Sequence[Planned]) -> Events[list[Quantized]]:
    """Write the outputs; rows that several are made of are read once."""
    artifacts = [_with_codes(each.artifact, each.rounding) for each in ready]
    begun = time.monotonic()
    events = write_artifacts(artifacts, threads=min(each.threads for each in ready))
    finished = yield from in_phase("quantizing", take_all(events, ArtifactDone))
    seconds = time.monotonic() - begun
    return [
        _describe(each, artifact, written.source_digest, seconds)
        for each, artifact, written in zip(ready, artifacts, finished, strict=True)
    ]


def _describe(
    ready: Planned, artifact: GgufFile | ModelFolder, digest: str | None, seconds: float
) -> Quantized:
    if ready.rounding is None:
        return Quantized(artifact, ready.threads, digest, seconds)
    store = ready.rounding.store
    gain = None if store.trained is None else store.trained.gain.fields
    return Quantized(artifact, ready.threads, digest, seconds, tuple(store.outcomes), gain)


def _with_codes(
    artifact: GgufFile | ModelFolder, rounding: Rounding | None
) -> GgufFile | ModelFolder:
    """The artifact with the tensors that a method rounded."""
    if rounding is None:
        return artifact
    if isinstance(artifact, GgufFile):
        return take_encoded(artifact, rounding.store)
    from quantcli.run.folder_codes import stored_codes

    return replace(artifact, codes=stored_codes(artifact, rounding.store))
