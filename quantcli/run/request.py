"""What is asked of a quantization: a model, what to make of it, and the texts to run it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantcli.errors import UsageError
from quantcli.layerwise.require_torch import require_torch
from quantcli.plan.recipe import FIELDS, Recipe, given_fields, is_allocated
from quantcli.plan.recipe_check import check_recipe
from quantcli.plan.recipe_defaults import TOWER_TYPE, USUAL_ROUNDER
from quantcli.plan.schemes import GGUF

_COMMON = ("pre", "ignore_tensors", "chat_template")
"""Fields that say how the model is opened, which all outputs share."""


@dataclass(frozen=True)
class Wanted:
    """One output: how it is made, and its path if it is not to be named after model and recipe."""

    recipe: Recipe
    path: Path | None = None
    bits: int | None = None
    """As asked for; 16 leaves weights that are stored as float16 as they are."""
    folder: Path | None = None
    """Where it goes under its usual name, if not into the current folder."""


@dataclass(frozen=True)
class Request:
    """One or several outputs of one model.

    ``texts`` are files to run the model on, by the methods or for an importance matrix; ``chunks``
    limits their windows. ``resume`` continues an interrupted run, ``force`` replaces what exists,
    ``dry_run`` plans and writes nothing. ``max_memory`` limits resident memory while weights are
    written, in bytes.
    """

    source: str
    outputs: Sequence[Wanted]
    texts: Sequence[str] = ()
    chunks: int | None = None
    resume: bool = False
    force: bool = False
    dry_run: bool = False
    threads: int | None = None
    max_memory: int | None = None


def tower_beside(wanted: Wanted, type: str | None) -> Wanted:
    """The vision or audio tower next to a text model, of this type (F16).

    UsageError unless the text model is wanted as a GGUF.
    """
    if wanted.recipe.to != GGUF or wanted.recipe.mmproj_only:
        other = "--mmproj-only" if wanted.recipe.mmproj_only else f"--to {wanted.recipe.to}"
        raise UsageError(
            f"--mmproj writes a tower beside a GGUF, not with {other}", hint="leave one of them out"
        )
    recipe = Recipe(type=type or TOWER_TYPE, mmproj_only=True)
    return Wanted(recipe, folder=wanted.path.parent if wanted.path else None)


def check_request(request: Request) -> None:
    """UsageError for whatever is wrong whatever the model; MissingExtraError for methods."""
    for wanted in request.outputs:
        recipe = wanted.recipe
        if request.chunks is not None and recipe.method is None and not request.texts:
            raise UsageError("--chunks cuts a text to run", hint="add --calibrate TEXT")
        if recipe.method is not None:
            # Methods are loaded to be checked.
            require_torch()
            from quantcli.run.recipe_options import check_methods

            check_methods(recipe, resume=request.resume)
        else:
            _refuse_without_method(recipe, request)
            if request.texts and not recipe.mmproj_only:
                _check_calibration(recipe, request)
        check_recipe(recipe)
        known = recipe.method or recipe.imatrix or request.texts
        if is_allocated(recipe) and not known and not recipe.mmproj_only:
            raise UsageError(
                "--allocate needs to know what each choice costs",
                hint=f"add --method {USUAL_ROUNDER} --calibrate TEXT, or --imatrix FILE",
            )
    paths = [wanted.path for wanted in request.outputs if wanted.path is not None]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UsageError(f"two outputs are called {twice}", hint="give each a name of its own")
    recipes = [each.recipe for each in request.outputs if not each.recipe.mmproj_only]
    for name in _COMMON:
        if len({getattr(recipe, name) for recipe in recipes}) > 1:
            flag = FIELDS[name].flag
            raise UsageError(
                f"the outputs of one run have different {flag}", hint="give them the same"
            )


def _refuse_without_method(recipe: Recipe, request: Request) -> None:
    """UsageError for what only a method can do."""
    wanted = [field.flag for field, _ in given_fields(recipe) if field.section.calibrated]
    for flag in [*wanted, *(["--resume"] if request.resume else [])]:
        raise UsageError(f"{flag} belongs to a method", hint=f"add --method {USUAL_ROUNDER}")


def _check_calibration(recipe: Recipe, request: Request) -> None:
    if recipe.imatrix:
        raise UsageError("--calibrate and --imatrix exclude each other", hint="give one of them")
    if request.dry_run:
        raise UsageError(
            "--dry-run does not run the model, as --calibrate would",
            hint="'quantcli calibrate' first, then --imatrix FILE --dry-run",
        )
