"""Refuse whatever is wrong with a recipe whatever the model, before one is opened."""

from __future__ import annotations

from quantcli.errors import UsageError
from quantcli.plan.patterns import parse_format
from quantcli.plan.recipe import KEPT, Recipe, given_fields, is_allocated, list_wanted
from quantcli.plan.schemes import (
    check_scheme,
    find_output_layout,
    find_scheme,
    has_types,
    knows_importance,
)


def check_recipe(recipe: Recipe) -> None:
    """UsageError for a field that the output does not take, a wrong value, or two that clash."""
    check_scheme(recipe)
    for field, value in given_fields(recipe):
        field.refuse_wrong(value)
    if recipe.on_fallback == "nearest" and has_types(recipe.to):
        raise UsageError(
            f"--on-fallback nearest is about a folder's groups, and --to {recipe.to} has none",
            hint="warn takes the next larger type, error stops",
        )
    if recipe.mmproj_only:
        _check_tower(recipe)
    _check_allocation(recipe)
    if recipe.correct_bias and recipe.method is not None:
        raise UsageError(
            f"--correct-bias is for rounding to nearest by an importance matrix, and --method "
            f"{recipe.method} has its own way: it minimizes the error on the inputs as they are, "
            "mean included",
            hint="leave one of them out: --calibrate TEXT alone makes the matrix, and --allocate "
            "goes with it",
        )
    if recipe.include_weights and recipe.exclude_weights:
        raise UsageError("include_weights and exclude_weights cannot be used together")


def _check_allocation(recipe: Recipe) -> None:
    """UsageError for two sizes, and for kinds to choose from that there are not."""
    if recipe.target_size is not None and recipe.target_bpw is not None:
        raise UsageError(
            "--target-size and --target-bpw both say how large it becomes", hint="leave one out"
        )
    if recipe.allocate_from is None:
        return
    if not is_allocated(recipe):
        raise UsageError(
            "--allocate-from names what --allocate chooses from", hint="add --allocate"
        )
    layout = find_output_layout(recipe.to)
    for name in list_wanted(recipe):
        if layout is None:
            parse_format(name)
        elif name != KEPT:
            find_scheme(recipe, layout, name, "BF16", knows_importance(recipe))


def _check_tower(recipe: Recipe) -> None:
    """UsageError for what a tower cannot be made with: nothing runs it on texts."""
    for given, flag in (
        (recipe.method, "--method"), (recipe.imatrix, "--imatrix"),
        (recipe.correct_bias or None, "--correct-bias"),
    ):  # fmt: skip
        if given is not None:
            raise UsageError(
                f"{flag} is for the text model, not for the tower of --mmproj-only",
                hint="--mmproj writes the tower beside a text model made that way",
            )
