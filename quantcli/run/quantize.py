"""The one sequence of a quantization: open, plan, calibrate, choose types, transform, round, write.

`quantize` yields what happens and returns what was made; the command line and the Python API both
drain it. The model is opened once for all outputs, and what is wrong with any is said before work
begins. Outputs that round to nearest are written together, from one read; so are those for which a
method runs the model once. Each batch is written when everything else is known of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.archs.towers import has_tower
from quantcli.artifacts.atomic import stamp
from quantcli.artifacts.gguf_file import GgufFile
from quantcli.artifacts.prepare import model_name, prepare_artifact
from quantcli.artifacts.scratch_place import work_path
from quantcli.artifacts.shared_write import Sharing
from quantcli.artifacts.staging import remove_left
from quantcli.errors import UsageError
from quantcli.events import Events
from quantcli.layerwise.require_torch import require_torch
from quantcli.model import Model, open_model, open_tower
from quantcli.plan.recipe import Recipe, is_allocated
from quantcli.plan.schemes import GGUF
from quantcli.plan.text_file import read_template
from quantcli.run.allocation_targets import find_target
from quantcli.run.bias_means import take_means
from quantcli.run.outputs import Planned, Quantized, needed_statistics, needs_text
from quantcli.run.plan_outputs import Placed, own_folders, place_all, plan_all
from quantcli.run.remote_note import note_remote
from quantcli.run.request import Request, check_division, check_request, check_texts
from quantcli.run.set_journal import open_journal
from quantcli.run.sharing import share_with_others
from quantcli.run.write_outputs import Ledger, write_outputs
from quantcli.sources.imatrix import Importance, read_importance
from quantcli.types import Note

if TYPE_CHECKING:
    from quantcli.run.calibrated_run import Rounding


def quantize(
    request: Request, *, on_fetch: Callable[..., None] | None = None
) -> Events[list[Quantized]]:
    """Do what is asked; returns each output in turn, and yields an `OutputDone` when one is whole.

    ``on_fetch`` takes the progress of a download. Raises a QuantcliError in one sentence for
    whatever is wrong. What ends it early leaves no output but those that are whole, and an existing
    one untouched; layers that were rounded are kept for ``resume``, and the last note says where.
    """
    runs = request.texts or any(
        wanted.recipe.method or is_allocated(wanted.recipe) for wanted in request.outputs
    )
    if request.share is None or not request.share.together or not runs or request.dry_run:
        return (yield from _quantize(request, on_fetch))
    require_torch()
    check_division(request)
    from quantcli.ranks.group import join

    with join(request.share):
        return (yield from _quantize(request, on_fetch))


def _quantize(request: Request, on_fetch: Callable[..., None] | None) -> Events[list[Quantized]]:
    """The same, by this process or as one of the ranks that it has joined."""
    began = time.monotonic()
    check_request(request)
    check_texts(request)
    recipes = [wanted.recipe for wanted in request.outputs]
    if request.texts:
        require_torch()
    files = {recipe.imatrix for recipe in recipes if recipe.imatrix}
    known = {file: read_importance(Path(file)) for file in files}
    if request.remark:
        yield Note(request.remark, "warning")
    if request.left_out:
        yield Note(
            f"{', '.join(request.left_out)} of the set are left out, since they need an importance "
            "matrix; --calibrate TEXT or --imatrix FILE adds them",
            "warning",
        )
    begun: list[Rounding] = []
    ledger: Ledger | None = None
    try:
        with _open(request, recipes, on_fetch) as model, own_folders(request):
            placed = place_all(request, model)
            _refuse_same_paths(placed)
            journal = None
            if request.is_set:
                journal = open_journal(request, model, [each.path for each in placed])
            matrix = _matrix_path(request, model, placed)
            if matrix is not None and journal is not None and journal.is_whole(matrix):
                known[str(matrix)] = read_importance(matrix)
            # All that would be refused is refused before any long work begins.
            planned = plan_all(request, placed, known, matrix, journal)
            yield from _tower_note(model, recipes)
            if request.texts or any(recipe.method for recipe in recipes):
                yield from note_remote(model)
            if request.dry_run:
                return (yield from _show_plans(planned))
            ledger = Ledger(planned, journal, began)
            yield from _make(request, model, matrix, known, ledger, begun)
    except BaseException as stopped:
        kept = [note for rounding in begun for note in rounding.abandon()]
        if ledger is not None and ledger.journal is not None and not ledger.failed:
            kept += ledger.last_words(stopped)
        if not isinstance(stopped, GeneratorExit):
            yield from kept
        raise
    for rounding in begun:
        rounding.finish()
    if ledger.journal is not None and ledger.is_complete:
        ledger.journal.remove()
    return ledger.finished


def _make(
    request: Request, model: Model, matrix: Path | None, known: dict[str, Importance],
    ledger: Ledger, begun: list[Rounding],
) -> Events[None]:  # fmt: skip
    """Make all outputs that are not whole yet, batch by batch."""
    if ledger.journal is not None and request.force:
        ledger.journal.remove()
    for each in ledger.planned:
        if each.kept is not None:
            for path in each.artifact.paths:
                remove_left(path)
            yield ledger.add(each, Quantized(each.artifact, each.threads, each.kept, kept=True))
    if kept := len(ledger.done):
        yield Note(f"{kept} of {len(ledger.planned)} outputs are whole already, and stay")
    plain = [each for each in ledger.planned if each.run is None and each.kept is None]
    takers = [each for each in plain if not each.is_tower]
    importance = known.get(str(matrix))
    if matrix is not None and takers and importance is None:
        importance, files = yield from _calibrate(request, model, matrix, takers)
        if ledger.journal is not None:
            stamps = {file.name: stamp(file) for file in files}
            ledger.journal.add(matrix.name, stamps)
    if plain:
        if importance is not None:
            plain = [
                each if each.is_tower else _with_importance(request, each, importance)
                for each in plain
            ]
        if any(is_allocated(each.artifact.plan.recipe) for each in plain):
            from quantcli.run.choose_by_importance import choose_by_importance

            plain = yield from choose_by_importance(request, plain)
        yield from write_outputs(plain, ledger, _sharing(request, plain), resume=request.resume)
    methodical = [each for each in ledger.planned if each.run is not None]
    if methodical:
        from quantcli.run.apply_methods import apply_methods, group_runs, statistics_beside
        from quantcli.run.calibrated_run import remove_run
        from quantcli.run.write_samples import with_samples

        methodical = yield from with_samples(methodical, request)
        with statistics_beside(request, methodical[0].path) as statistics:
            for batch in group_runs(methodical):
                if all(each.kept is not None for each in batch):
                    files = [path for each in batch for path in each.artifact.paths]
                    remove_run(work_path(batch[0].path, request.scratch), files)
                    continue
                # Those that are whole take part: the run that was interrupted was theirs too.
                made = yield from apply_methods(request, batch, statistics, begun)
                rest = [each for each in made if each.kept is None]
                sharing = _sharing(request, rest)
                yield from write_outputs(rest, ledger, sharing, resume=request.resume)
    ledger.refuse_failed()


def _sharing(request: Request, outputs: Sequence[Planned]) -> Sharing | None:
    """How outputs are written together with others, where this process has a share."""
    if request.share is None:
        return None
    return share_with_others(request, request.share, outputs)


def _refuse_same_paths(placed: Sequence[Placed]) -> None:
    paths = [each.path for each in placed]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UsageError(
            f"two outputs are called {twice}",
            hint="give each a name of its own: name = ... under [[outputs]] of a recipe",
        )


def _open(
    request: Request, recipes: Sequence[Recipe], on_fetch: Callable[..., None] | None
) -> Model:
    """The text model, or its tower where nothing else is wanted."""
    if all(recipe.mmproj_only for recipe in recipes):
        if request.texts:
            raise UsageError("--calibrate runs the text model, which --mmproj-only leaves out")
        return open_tower(request.source, download=request.download, on_progress=on_fetch)
    return open_model(
        request.source,
        pre=recipes[0].pre,
        vocabulary=bool(request.texts)
        or any(r.to == GGUF or r.method or is_allocated(r) for r in recipes),
        table=any(r.to == GGUF for r in recipes),
        gguf_only=all(r.to == GGUF for r in recipes),
        ignored=recipes[0].ignore_tensors,
        template=read_template(template) if (template := recipes[0].chat_template) else None,
        download=request.download,
        on_progress=on_fetch,
    )


def _tower_note(model: Model, recipes: Sequence[Recipe]) -> Iterator[Note]:
    """That a GGUF leaves the tower out, where quantcli could write it."""
    is_wanted = any(recipe.mmproj_only for recipe in recipes)
    if not is_wanted and any(r.to == GGUF for r in recipes) and has_tower(model.config):
        yield Note("the tower beside the text model is left out; --mmproj writes it as well")


def _matrix_path(request: Request, model: Model, placed: Sequence[Placed]) -> Path | None:
    """Where the importance matrix that the texts make is kept, if an output takes one."""
    takers = [each for each in placed if each.recipe.method is None and not each.recipe.mmproj_only]
    if not request.texts or not takers:
        return None
    if request.is_set and all(wanted.path is None for wanted in request.outputs):
        return takers[0].path.with_name(f"{model_name(model)}.calib.gguf")
    return calibration_path(takers[0].path)


def _calibrate(
    request: Request, model: Model, path: Path, takers: Sequence[Planned]
) -> Events[tuple[Importance, list[Path]]]:
    """The importance matrix of the texts, and its files: what static scales need lies beside it."""
    from quantcli.run.calibrate import calibrate_for
    from quantcli.statistics.importance_file import output_paths

    needs = {need for each in takers for need in needed_statistics(each.artifact)}
    importance = yield from calibrate_for(request, model, path, collect=sorted(needs))
    return importance, output_paths(path, tuple(needs))


def _with_importance(request: Request, planned: Planned, importance: Importance) -> Planned:
    """The output with what the texts gave: an importance matrix, static scales, means."""
    from quantcli.statistics.importance_file import stats_path

    artifact, recipe = planned.artifact, planned.artifact.plan.recipe
    weighted, measured = recipe.imatrix is not None, stats_path(importance.path)
    if weighted:
        recipe = replace(recipe, imatrix=str(importance.path))
    if needed_statistics(artifact):
        recipe = replace(recipe, statistics=str(measured))
    artifact = prepare_artifact(
        artifact.model,
        recipe,
        planned.path,
        importance=importance if weighted else None,
        force=request.force,
    )
    if isinstance(artifact, GgufFile):
        return replace(planned, artifact=take_means(artifact))
    if needs_text(artifact):
        from quantcli.run.static_scales import take_scales

        artifact = take_scales(artifact, measured)
    return replace(planned, artifact=artifact)


def calibration_path(output: Path) -> Path:
    """Where the importance matrix of a quantization to ``output`` is kept, next to it."""
    return output.with_name(f"{output.name.removesuffix('.gguf')}.calib.gguf")


def _show_plans(planned: Sequence[Planned]) -> Events[list[Quantized]]:
    yield from dict.fromkeys(note for each in planned for note in each.artifact.plan.notes)
    for each in planned:
        recipe = each.artifact.plan.recipe
        if is_allocated(recipe):
            target = find_target(each.artifact.model, each.artifact, each.path, None, check=False)
            yield Note(
                f"{target.noun}s are chosen as it runs; until then these are {target.label}'s"
            )
        if needs_text(each.artifact) and each.artifact.scales is None:
            yield Note("static scales are found as it runs, on the text of --calibrate")
    return [
        Quantized(each.artifact, each.threads, kept=each.kept is not None, forecast=each.forecast)
        for each in planned
    ]
