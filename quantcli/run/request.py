"""What is asked of a quantization: a model, what to make of it, and the texts to run it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantcli.artifacts.atomic_folder import MANIFEST
from quantcli.artifacts.stream import STREAM
from quantcli.errors import UsageError
from quantcli.layerwise.require_torch import require_torch
from quantcli.plan.filetypes import find_file_type
from quantcli.plan.output_set import OutputSet
from quantcli.plan.recipe import FIELDS, Recipe, given_fields, is_allocated
from quantcli.plan.recipe_check import check_recipe
from quantcli.plan.recipe_defaults import TOWER_TYPE, USUAL_ROUNDER
from quantcli.plan.schemes import GGUF, has_static_scales, has_types
from quantcli.ranks.share import Share

_NOT_GGUF = (".safetensors", ".pt", ".pth")
"""Endings of files that hold weights in other formats."""
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
    """Where it goes under its usual name, if not into the current folder; made if need be."""
    name: str | None = None
    """Its name there in place of the usual one."""


@dataclass(frozen=True)
class Request:
    """One or several outputs of one model.

    ``texts`` are files to run the model on, by the methods or for an importance matrix; ``chunks``
    limits their windows. ``resume`` continues an interrupted run, ``force`` replaces what exists,
    ``dry_run`` plans and writes nothing. ``max_memory`` limits resident memory and ``max_scratch``
    the run's own files, in bytes. ``left_out`` are types of a named set that lack an importance
    matrix, ``remark`` is said before the work.
    ``device`` is where the model is run and methods round, a name of `quantcli.layerwise.devices`.
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
    left_out: Sequence[str] = ()
    remark: str | None = None
    share: Share | None = None
    """This process's share of the work, where several do it."""
    download: bool = False
    """Store a model of the Hub in its cache instead of reading it where it is."""
    device: str | None = None
    scratch: Path | None = None
    """The folder for the run's own files; None for that of each output."""
    max_scratch: int | None = None

    @property
    def is_set(self) -> bool:
        """Whether there are several outputs, a tower beside one not counted."""
        return sum(not wanted.recipe.mmproj_only for wanted in self.outputs) > 1


def place_outputs(
    outputs: OutputSet, place: str | Path | None, *, mmproj: bool = False,
    mmproj_type: str | None = None,
) -> list[Wanted]:  # fmt: skip
    """The outputs where ``place`` says, and a tower beside them if one is wanted.

    ``place`` is one output's path, or with a slash behind it, for a set and where it is a folder
    that takes a GGUF, the folder in which each has its usual name. UsageError for a set in one
    file.
    """
    asked = outputs.outputs
    path = None if place is None else Path(place)
    folder: Path | None = None
    if (
        path is not None
        and path != STREAM
        and (len(asked) > 1 or _is_container(place, path, asked[0].recipe))
    ):
        path, folder = None, path
    if folder is not None and folder.suffix == ".gguf" and not folder.is_dir():
        raise UsageError(
            f"-o {folder} names one file, and {len(asked)} outputs are asked for"
            if len(asked) > 1 else f"-o {place} names a file, and a slash follows",
            hint="name a folder for them: -o FOLDER/",
        )  # fmt: skip
    found = [Wanted(each.recipe, path, each.bits, folder, each.name) for each in asked]
    if mmproj or mmproj_type:
        text = next((each for each in found if each.recipe.to == GGUF), found[0])
        found.append(tower_beside(text, mmproj_type))
    return found


def _is_container(place: str | Path | None, path: Path, recipe: Recipe) -> bool:
    """Whether one output goes into the folder ``path`` rather than being called so."""
    if recipe.to == GGUF:
        return str(place).endswith("/") or path.is_dir()
    return str(place).endswith("/") and not (path / MANIFEST).is_file()


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
    return Wanted(recipe, folder=wanted.path.parent if wanted.path else wanted.folder)


def check_request(request: Request) -> None:
    """UsageError for whatever is wrong whatever the model; MissingExtraError for methods."""
    if not request.outputs:
        raise UsageError("no output is asked for", hint="add --type NAME")
    if any(STREAM in (wanted.path, wanted.folder) for wanted in request.outputs):
        _check_stream(request)
    if request.is_set:
        _check_importance(request)
    runs = request.texts or any(wanted.recipe.method for wanted in request.outputs)
    if runs and request.share is not None and not request.share.together:
        raise UsageError(
            "--shard divides the writing of weights, and a method or --calibrate runs the model",
            hint="torchrun starts ranks that run it together; or 'quantcli calibrate' first, then "
            "--imatrix FILE --shard",
        )
    if request.chunks is not None and not runs:
        raise UsageError("--chunks cuts a text to run", hint="add --calibrate TEXT")
    if request.device is not None:
        allocated = any(is_allocated(wanted.recipe) for wanted in request.outputs)
        _check_device(request.device, runs=bool(runs) or allocated)
    for wanted in request.outputs:
        recipe = wanted.recipe
        if recipe.method is not None:
            # Methods are loaded to be checked.
            require_torch()
            from quantcli.run.recipe_options import check_methods

            check_methods(recipe, resume=request.resume and not request.is_set)
        else:
            _refuse_without_method(recipe, request)
            if request.texts and not recipe.mmproj_only:
                _check_calibration(recipe, request)
        check_recipe(recipe)
        known = recipe.method or recipe.imatrix or request.texts
        if is_allocated(recipe) and not known and not recipe.mmproj_only:
            raise UsageError(
                f"{_sizing(recipe)} needs to know what each choice costs",
                hint=f"add --method {USUAL_ROUNDER} --calibrate TEXT, or --imatrix FILE",
            )
        if is_allocated(recipe) and not recipe.mmproj_only:
            require_torch()
    paths = [wanted.path for wanted in request.outputs if wanted.path is not None]
    for wanted in request.outputs:
        path = wanted.path
        if path is not None and wanted.recipe.to == GGUF and path.suffix in _NOT_GGUF:
            raise UsageError(
                f"a GGUF is written, and {path} is no name for one",
                hint=f"-o {path.with_suffix('.gguf')}; --to hf makes a folder of safetensors",
            )
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


def _check_device(name: str, *, runs: bool) -> None:
    """UsageError for a device that is not there, or that nothing would use."""
    if not runs:
        if name not in ("auto", "cpu"):
            raise UsageError(
                f"nothing would run on {name}: weights that are rounded to nearest are encoded on "
                "the CPU",
                hint=f"add --method {USUAL_ROUNDER} or --calibrate TEXT, or leave --device out",
            )
        return
    require_torch()
    from quantcli.layerwise.devices import choose_device

    choose_device(name)


def check_division(request: Request) -> None:
    """UsageError for what ranks that run a model do not divide, before they meet."""
    for wanted in request.outputs:
        if wanted.recipe.method is not None:
            _check_division(wanted.recipe)


def _check_division(recipe: Recipe) -> None:
    from quantcli.run.recipe_options import read_options

    if read_options(recipe).propagate:
        raise UsageError(
            "ranks divide the windows of one model, not --propagate",
            hint="leave it out, or unset RANK and WORLD_SIZE for one process",
        )


def _check_stream(request: Request) -> None:
    """UsageError for what cannot go to standard output."""
    wanted, *others = request.outputs
    if others:
        raise UsageError(
            f"standard output takes one file, and {len(request.outputs)} outputs are asked for",
            hint="name a folder for them: -o FOLDER/",
        )
    if wanted.recipe.to != GGUF:
        raise UsageError(
            f"--to {wanted.recipe.to} makes a folder, and standard output takes a GGUF",
            hint="name the folder with -o",
        )
    if wanted.recipe.method is not None or is_allocated(wanted.recipe):
        raise UsageError(
            "a method keeps its work beside the output, where --resume finds it, and standard "
            "output has no such place",
            hint="name a file with -o",
        )
    if request.share is not None:
        raise UsageError(
            "processes share a file, and standard output is one process's", hint="name it with -o"
        )
    if request.texts:
        raise UsageError(
            "the importance matrix that --calibrate makes is kept next to the output, and standard "
            "output has no such place",
            hint="'quantcli calibrate' first, then --imatrix FILE",
        )


def refuse_with_stream(place: str | Path | None, **given: object) -> None:
    """UsageError for an option that needs the output to be a file, where it is a pipe."""
    if place is None or str(place) != str(STREAM):
        return
    for name, value in given.items():
        if value:
            raise UsageError(
                f"--{name} needs a file, and -o - writes to standard output",
                hint="name a file with -o",
            )


def _check_importance(request: Request) -> None:
    """UsageError for the types of a set that need an importance matrix, where there is none."""
    lacking = [
        wanted.recipe.type
        for wanted in request.outputs
        if has_types(wanted.recipe.to)
        and not (wanted.recipe.imatrix or wanted.recipe.method or request.texts)
        and find_file_type(wanted.recipe.type).needs_importance
    ]
    if lacking:
        raise UsageError(
            f"{' and '.join(lacking)} {'needs' if len(lacking) == 1 else 'need'} an importance "
            "matrix, and none is given",
            hint="add --calibrate TEXT or --imatrix FILE, or leave "
            f"{'it' if len(lacking) == 1 else 'them'} out",
        )


def takes_importance(recipe: Recipe) -> bool:
    """Whether a text that is run without a method makes an importance matrix for the recipe.

    With ranges that are found without one, it may be for static scales alone.
    """
    return recipe.range in (None, "imatrix") or not has_static_scales(recipe)


def check_texts(request: Request) -> None:
    """UsageError where scales are to be found on a text and none is given, or one too many."""
    for wanted in request.outputs:
        recipe = wanted.recipe
        if recipe.correct_bias:
            _check_means(recipe, request)
            continue
        if not has_static_scales(recipe):
            if recipe.statistics is not None:
                raise UsageError(
                    "--statistics tells static scales, or with --correct-bias means, and neither "
                    "is asked for",
                    hint="leave it out",
                )
            continue
        what = "--kv-cache" if recipe.kv_cache else "a scheme with static scales"
        if recipe.statistics is not None:
            transforms = recipe.method is not None and _transforms(recipe.method)
            if transforms:
                raise UsageError(
                    f"--method {recipe.method} changes the activations whose scales --statistics "
                    "tells",
                    hint="leave --statistics out: the method's own text tells them",
                )
            if request.texts and recipe.method is None:
                raise UsageError(
                    "--calibrate and --statistics both tell static scales", hint="give one of them"
                )
        elif not request.texts and recipe.method is None and not request.dry_run:
            dynamic = "" if recipe.kv_cache else "; FP8_DYNAMIC, W8A8 and NVFP4A16 need none"
            raise UsageError(
                f"{what} needs a text to run the model on, since they are found there",
                hint=f"--calibrate TEXT, or --statistics FILE of 'quantcli calibrate'{dynamic}",
            )


def _check_means(recipe: Recipe, request: Request) -> None:
    """UsageError where nothing, or two things, tell the inputs' means."""
    if request.texts and recipe.statistics is not None:
        raise UsageError(
            "--calibrate and --statistics both tell the inputs' means", hint="give one of them"
        )
    if not request.texts and recipe.statistics is None and not request.dry_run:
        raise UsageError(
            "--correct-bias needs a text to run the model on, since the inputs' means are found "
            "there",
            hint="--calibrate TEXT, or --statistics FILE of 'quantcli calibrate --collect mean'",
        )


def _transforms(method: str) -> bool:
    from quantcli.run.methods import parse_methods

    return bool(parse_methods(method).transforms)


def _sizing(recipe: Recipe) -> str:
    """The option that asks for types to be chosen."""
    given = {"--target-size": recipe.target_size, "--target-bpw": recipe.target_bpw}
    return next((flag for flag, value in given.items() if value is not None), "--allocate")


def _refuse_without_method(recipe: Recipe, request: Request) -> None:
    """UsageError for what only a method can do."""
    wanted = [field.flag for field, _ in given_fields(recipe) if field.section.calibrated]
    resumes = request.resume and not (request.is_set or request.texts)
    for flag in [*wanted, *(["--resume"] if resumes else [])]:
        raise UsageError(f"{flag} belongs to a method", hint=f"add --method {USUAL_ROUNDER}")


def _check_calibration(recipe: Recipe, request: Request) -> None:
    if recipe.imatrix:
        raise UsageError("--calibrate and --imatrix exclude each other", hint="give one of them")
    if request.dry_run:
        raise UsageError(
            "--dry-run does not run the model, as --calibrate would",
            hint="'quantcli calibrate' first, then --imatrix FILE --dry-run",
        )
