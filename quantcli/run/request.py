"""What is asked of a quantization: a model, what to make of it, and the texts to run it on.

What the short forms mean (bits, quality, "best") and which wishes exclude each other stands here,
for the command line and the Python API alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.errors import UsageError
from quantcli.plan.filetypes import type_of_bits
from quantcli.plan.recipe import Recipe, check_recipe, merge_recipe
from quantcli.plan.schemes import has_types
from quantcli.run.methods import ROUNDER, parse_methods
from quantcli.run.recipe_options import check_methods

BEST = "best"


@dataclass(frozen=True)
class Wanted:
    """One output: how it is made, and its path if it is not to be named after model and recipe."""

    recipe: Recipe
    path: Path | None = None


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


def make_recipe(
    base: Recipe, *, bits: int | None = None, quality: str | None = None, **fields: Any
) -> Recipe:
    """``base`` with ``fields`` replaced as in `merge_recipe`, and the short forms written out.

    ``bits`` stand for a file type where the output is made of types. UsageError for what is
    unknown or contradicts itself.
    """
    if bits is not None and not has_types(fields.get("to") or base.to):
        fields["bits"] = bits
    elif bits is not None:
        if fields.get("type") is not None:
            raise UsageError(
                "--bits and --type exclude each other",
                hint=f"--bits {bits} means --type {type_of_bits(bits)}",
            )
        fields["type"] = type_of_bits(bits)
    recipe = merge_recipe(base, **fields)
    if quality not in (None, "fast", "high"):
        raise UsageError(f"there is no quality {quality!r}", hint="fast or high")
    method = recipe.method or (BEST if quality == "high" else "")
    if method.strip().lower() != BEST:
        return recipe
    # Choosing types gave more than any training did, and keeps the size.
    return merge_recipe(recipe, method=ROUNDER, allocate=recipe.to == "gguf" or None)


def check_request(request: Request) -> None:
    """UsageError for whatever is wrong whatever the model."""
    for wanted in request.outputs:
        _check_run(wanted.recipe, request)
        check_recipe(wanted.recipe)
    if len({wanted.recipe.pre for wanted in request.outputs}) > 1:
        raise UsageError("the outputs of one run have different --pre", hint="give them the same")


def _check_run(recipe: Recipe, request: Request) -> None:
    if recipe.method is not None:
        if request.resume and not parse_methods(recipe.method).rounds:
            raise UsageError(
                f"--method {recipe.method} leaves nothing to resume", hint="run it again without"
            )
        check_methods(recipe)
        return
    if request.chunks is not None and not request.texts:
        raise UsageError("--chunks cuts a text to run", hint="add --calibrate TEXT")
    given = {
        "--damping": recipe.damping, "--column-order": recipe.column_order,
        "--sweeps": recipe.sweeps, "--fisher-windows": recipe.fisher_windows,
        "--random-share": recipe.random_share, "--propagate": recipe.propagate or None,
        "--tune-steps": recipe.tune_steps, "--allocate": recipe.allocate or None,
        "--target-size": recipe.target_size, "--tune": recipe.tune,
        "--e2e-steps": recipe.e2e_steps, "--resume": request.resume or None,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{name} belongs to a method", hint="add --method gptq")
    if not request.texts:
        return
    if recipe.imatrix:
        raise UsageError("--calibrate and --imatrix exclude each other", hint="give one of them")
    if request.dry_run:
        raise UsageError(
            "--dry-run does not run the model, as --calibrate would",
            hint="'quantcli calibrate' first, then --imatrix FILE --dry-run",
        )
