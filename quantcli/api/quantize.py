"""``quantcli.quantize``: a quantization from Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, get_origin

from quantcli.api.calls import (
    Names,
    Watch,
    as_names,
    as_path,
    parse_bytes,
    refuse_below_one,
    takes_keywords,
)
from quantcli.api.fit import choose_type, read_fit
from quantcli.api.recipe_options import RecipeOptions
from quantcli.events import Show, drain
from quantcli.plan.recipe import FIELDS, Recipe
from quantcli.plan.recipe_defaults import resolve_recipe
from quantcli.plan.recipe_file import load_recipe
from quantcli.report.quantized import whole_document
from quantcli.run import quantize as quantizing
from quantcli.run.request import Request, Wanted, tower_beside
from quantcli.types import Note


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize` made, or with ``dry_run`` would make.

    ``nbytes`` is the exact size of all files together, but for ``mmproj``. ``document`` holds the
    facts that ``quantcli quantize --json`` prints: with ``dry_run`` what each tensor would become
    and why, else, under "tensors", what became of each one that a method rounded.
    ``source_digest`` is None for a dry run.
    """

    paths: tuple[Path, ...]
    nbytes: int
    bits_per_weight: float
    source_digest: str | None
    document: Mapping[str, Any]
    notes: tuple[Note, ...]
    mmproj: Path | None = None
    """The file of the vision or audio tower, if one was asked for beside the text model."""


@takes_keywords
def quantize(
    source: str | Path,
    output: str | Path | None = None,
    *,
    quality: Literal["fast", "high"] | None = None,
    fit: str | None = None,
    on: str | None = None,
    ctx: int | str | None = None,
    kv_type: str | None = None,
    mmproj: bool = False,
    mmproj_type: str | None = None,
    calibrate: Names = (),
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
    made of the model's and the recipe's, in the current folder. ``mmproj`` writes the vision or
    audio tower as well, next to it, as F16 or ``mmproj_type``. The texts ``calibrate`` are
    what a ``method`` runs the model on (the built-in text, if there are none), ``chunks`` windows
    of them at most; without a method they make an importance matrix, which is kept next to the
    output.
    ``fit`` chooses the type for a machine, as `inspect` does with ``on``, ``ctx`` and ``kv_type``.
    ``resume`` continues an interrupted run, ``dry_run`` plans and writes nothing. ``max_memory``
    limits the memory while weights are written, in bytes or as "300M".
    """
    refuse_below_one(threads=threads)
    base = recipe if isinstance(recipe, Recipe) else load_recipe(recipe) if recipe else Recipe()
    fields = {name: _as_field(name, value) for name, value in options.items()}
    watch = Watch(on_event)
    wish = read_fit(fit, on=on, ctx=ctx, kv_type=kv_type)
    if wish is not None:
        fields["type"] = choose_type(str(source), wish, fields, watch)
    resolved = resolve_recipe(base, quality=quality, **fields)
    outputs = [Wanted(resolved, as_path(output), fields.get("bits"))]
    if mmproj or mmproj_type:
        outputs.append(tower_beside(outputs[0], mmproj_type))
    request = Request(
        str(source),
        outputs,
        as_names(calibrate),
        chunks=chunks,
        resume=resume,
        force=force,
        dry_run=dry_run,
        threads=threads,
        max_memory=parse_bytes(max_memory),
    )
    done, *towers = drain(quantizing.quantize(request, on_fetch=watch), watch)
    document = whole_document([done, *towers], planned=dry_run)
    return QuantizeResult(
        done.artifact.paths,
        done.artifact.nbytes,
        done.artifact.bits_per_weight,
        done.digest,
        document,
        tuple(watch.notes),
        towers[0].artifact.paths[0] if towers else None,
    )


def _as_field(name: str, value: Any) -> Any:
    """What the recipe takes: paths as text, and lists where one entry is given."""
    if isinstance(value, Path):
        value = str(value)
    is_list = get_origin(FIELDS[name].kind) is tuple
    return (value,) if is_list and isinstance(value, str) else value
