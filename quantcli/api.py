"""The functions behind the commands, for Python: what the command line can say, they can.

Options are keywords, spelled as the command line's with ``_`` for ``-``. Each function calls
``on_event`` with progress, notes and what became of each tensor as it happens, and returns a
frozen result with the notes. Whatever is wrong is a `QuantcliError` in one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypedDict, TypeVar, Unpack

from quantcli.errors import UsageError
from quantcli.events import Show, drain
from quantcli.layerwise.require_torch import require_torch
from quantcli.plan.recipe import Recipe
from quantcli.plan.recipe_defaults import resolve_recipe
from quantcli.plan.recipe_file import load_recipe
from quantcli.plan.size_text import parse_size
from quantcli.registry import near
from quantcli.report.calibrations import calibration_document
from quantcli.report.quantized import planned_document, quantized_document
from quantcli.run import quantize as quantizing
from quantcli.run.request import Request, Wanted
from quantcli.types import Event, Note

if TYPE_CHECKING:
    from quantcli.statistics.importance_file import Calibration

P = ParamSpec("P")
T = TypeVar("T")


class RecipeOptions(TypedDict, total=False):
    """Keywords of `quantize` that are fields of a recipe; see ``quantcli quantize --help``."""

    type: str
    tensor_types: Sequence[str]
    output_tensor_type: str
    token_embedding_type: str
    leave_output_tensor: bool
    pure: bool
    imatrix: str | Path
    include_weights: Sequence[str]
    exclude_weights: Sequence[str]
    allow_requantize: bool
    override_kv: Sequence[str]
    on_fallback: Literal["warn", "error"]
    split_max_size: str
    pre: str
    to: str
    bits: int
    group_size: int | str
    symmetric: bool
    activations: str
    range: str
    keep: Sequence[str]
    dtype: str
    method: str
    damping: float
    column_order: Literal["natural", "activation"]
    sweeps: int
    fisher_windows: int
    random_share: float
    propagate: bool
    tune_steps: int
    allocate: bool
    target_size: str
    tune: Literal["e2e"]
    e2e_steps: int


def takes_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """The function with a `UsageError` that names the nearest keyword for one that it lacks.

    Its signature lists the keywords of a ``TypedDict`` one by one.
    """
    given = signature(function)
    parameters = [p for p in given.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    if len(parameters) < len(given.parameters):
        parameters += [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for name, kind in RecipeOptions.__annotations__.items()
        ]
    known = [parameter.name for parameter in parameters]

    @wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> T:
        for name in keywords:
            if name not in known:
                guess = near(name, known, most=1)
                hint = f"did you mean {guess[0]}?" if guess else "known: " + ", ".join(known)
                raise UsageError(f"quantcli.{function.__name__} takes no {name}", hint=hint)
        return function(*args, **keywords)

    call.__signature__ = given.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize` made, or with ``dry_run`` would make.

    ``nbytes`` is the exact size of all files together. ``document`` holds the facts that
    ``quantcli quantize --json`` prints: with ``dry_run`` what each tensor would become and why,
    else, under "tensors", what became of each one that a method rounded. ``source_digest`` is None
    for a dry run.
    """

    paths: tuple[Path, ...]
    nbytes: int
    bits_per_weight: float
    source_digest: str | None
    document: Mapping[str, Any]
    notes: tuple[Note, ...]


@takes_keywords
def quantize(
    source: str | Path,
    output: str | Path | None = None,
    *,
    quality: Literal["fast", "high"] | None = None,
    calibrate: Sequence[str | Path] = (),
    chunks: int | None = None,
    recipe: str | Path | Recipe | None = None,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    max_memory: int | str | None = None,
    on_event: Show | None = None,
    **options: Unpack[RecipeOptions],
) -> QuantizeResult:
    """Quantize a model to a GGUF, or with ``to`` to a model folder.

    ``options`` win over those of ``recipe``, a file or a `Recipe`. ``output`` defaults to a name
    made of the model's and the recipe's, in the current folder. The texts ``calibrate`` are what a
    ``method`` runs the model on (the built-in text, if there are none), ``chunks`` windows of them
    at most; without a method they make an importance matrix, which is kept next to the output.
    ``resume`` continues an interrupted run, ``dry_run`` plans and writes nothing. ``max_memory``
    limits the memory while weights are written, in bytes or as "300M".
    """
    base = recipe if isinstance(recipe, Recipe) else load_recipe(recipe) if recipe else Recipe()
    fields: dict[str, Any] = {**options}
    if fields.get("imatrix") is not None:
        fields["imatrix"] = str(fields["imatrix"])
    request = Request(
        str(source),
        [
            Wanted(
                resolve_recipe(base, quality=quality, **fields),
                None if output is None else Path(output),
            )
        ],
        [str(text) for text in calibrate],
        chunks=chunks,
        resume=resume,
        force=force,
        dry_run=dry_run,
        threads=threads,
        max_memory=_bytes(max_memory),
    )
    watch = _Watch(on_event)
    (done,) = drain(quantizing.quantize(request, on_fetch=watch), watch)
    document = planned_document(done) if dry_run else quantized_document(done)
    return QuantizeResult(
        done.artifact.paths,
        done.artifact.nbytes,
        done.bits_per_weight,
        done.digest,
        document,
        tuple(watch.notes),
    )


@dataclass(frozen=True)
class CalibrateResult:
    """What `calibrate` wrote or read: its sums, and as ``document`` what ``--json`` prints."""

    paths: tuple[Path, ...]
    nbytes: int
    calibration: Calibration
    document: Mapping[str, Any]
    notes: tuple[Note, ...]


@takes_keywords
def calibrate(
    source: str | Path | None = None,
    data: Sequence[str | Path] = (),
    *,
    output: str | Path | None = None,
    field: str | None = None,
    ctx: int = 512,
    chunks: int | None = None,
    seed: int | None = None,
    collect: Sequence[str] = (),
    dtype: str | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    pre: str | None = None,
    resume: bool = False,
    force: bool = False,
    legacy: bool = False,
    merge: Sequence[str | Path] = (),
    stats: bool = False,
    threads: int | None = None,
    on_event: Show | None = None,
) -> CalibrateResult:
    """Run a model on the texts ``data`` and write the importance matrix of its weights.

    Without texts the built-in one is taken; ``field`` is the key of a text in JSON lines. Windows
    have ``ctx`` tokens; the first ``chunks`` are run, or as many at random with ``seed``.
    ``collect`` names more statistics: abs_max, mean_abs, hessian. ``max_memory`` is that of hidden
    states, in bytes or as "4G". ``merge`` adds up finished calibrations instead, ``stats`` of a
    finished one only reads it. ``output`` defaults to NAME.calib.gguf in the current folder,
    ``legacy`` writes llama.cpp's older form.
    """
    if merge and (source is not None or data):
        raise UsageError(
            "--merge adds up finished calibrations and runs no model",
            hint="calibrate first, then merge the files",
        )
    if source is None and not merge:
        raise UsageError("no MODEL is given", hint="see 'quantcli calibrate --help'")
    require_torch()
    from quantcli.calibration import load
    from quantcli.run import calibrate as calibrating

    watch = _Watch(on_event)
    path = None if output is None else Path(output)
    if source is not None and stats and Path(source).is_file():
        paths: tuple[Path, ...] = ()
        found = load(Path(source))
    else:
        if source is None:
            run = calibrating.merge_calibrations(
                [Path(file) for file in merge], path, legacy=legacy, force=force
            )
        else:
            run = calibrating.calibrate(
                str(source), path, [str(text) for text in data], field=field, ctx=ctx,
                chunks=chunks, seed=seed, collect=collect, dtype=dtype, device=device,
                max_memory=_bytes(max_memory), pre=pre, resume=resume, force=force, legacy=legacy,
                threads=threads, on_fetch=watch,
            )  # fmt: skip
        done = drain(run, watch)
        paths, found = done.paths, done.calibration
    return CalibrateResult(
        paths,
        sum(each.stat().st_size for each in paths),
        found,
        calibration_document(found, list(map(str, paths)), stats=stats),
        tuple(watch.notes),
    )


def _bytes(size: int | str | None) -> int | None:
    return parse_size(size) if isinstance(size, str) else size


class _Watch:
    """Hands events on, and keeps the notes."""

    def __init__(self, on_event: Show | None) -> None:
        self._on_event = on_event
        self.notes: list[Note] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event)
        if self._on_event is not None:
            self._on_event(event)
