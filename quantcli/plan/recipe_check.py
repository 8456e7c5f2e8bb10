"""Refuse whatever is wrong with a recipe whatever the model, before one is opened."""

from __future__ import annotations

from quantcli.errors import UsageError
from quantcli.plan.recipe import Recipe, given_fields
from quantcli.plan.schemes import check_scheme, has_types


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
    if recipe.include_weights and recipe.exclude_weights:
        raise UsageError("include_weights and exclude_weights cannot be used together")


def _check_tower(recipe: Recipe) -> None:
    """UsageError for what a tower cannot be made with: nothing runs it on texts."""
    for given, flag in ((recipe.method, "--method"), (recipe.imatrix, "--imatrix")):
        if given is not None:
            raise UsageError(
                f"{flag} is for the text model, not for the tower of --mmproj-only",
                hint="--mmproj writes the tower beside a text model made that way",
            )
