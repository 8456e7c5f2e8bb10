"""What a request stands for: ``bits`` for a type, ``quality`` and "best" for methods.

A recipe, and so an output file, names the type and the methods themselves.
"""

from __future__ import annotations

from typing import Any

from quantcli.errors import UsageError
from quantcli.plan.filetypes import type_of_bits
from quantcli.plan.recipe import FIELDS, Recipe, merge_recipe
from quantcli.plan.schemes import GGUF, has_types

BEST = "best"
"""The method that stands for whichever was measured to win."""
QUALITIES = ("fast", "high")
USUAL_ROUNDER = "gptq"
"""The rounder where no method is named."""

TOWER_TYPE = "F16"
"""The type of a tower where none is named: towers are small, and what they see is lost for good."""


def resolve_recipe(base: Recipe, *, quality: str | None = None, **fields: Any) -> Recipe:
    """``base`` with the given fields, as `merge_recipe` puts them together.

    ``bits`` becomes a type for an output that is made of types; ``quality="high"``, like
    ``method="best"``, becomes what was measured to win. UsageError for an unknown name or number,
    and for bits beside a type.
    """
    bits = fields.get("bits")
    if bits is not None and has_types((fields.get("to") or base.to).lower()):
        if fields.get("type") is not None:
            raise UsageError(
                "--bits and --type exclude each other",
                hint=f"--bits {bits} means --type {type_of_bits(bits)}",
            )
        fields |= {"bits": None, "type": type_of_bits(bits)}
    recipe = merge_recipe(base, **fields)
    if recipe.mmproj_only and recipe.to == GGUF and recipe.type is FIELDS["type"].default:
        recipe = merge_recipe(recipe, type=TOWER_TYPE)
    if quality not in (None, *QUALITIES):
        raise UsageError(f"there is no quality {quality!r}", hint=" or ".join(QUALITIES))
    method = BEST if recipe.method is None and quality == "high" else recipe.method
    if method is None or method.strip().lower() != BEST:
        return recipe
    # Choosing types gave more than any training did, and keeps the size.
    return merge_recipe(recipe, method=USUAL_ROUNDER, allocate=recipe.to == "gguf" or None)
