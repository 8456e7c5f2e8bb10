"""What a request stands for: ``bits`` for a type, ``quality`` and "best" for methods.

A recipe, and so an output file, names the type and the methods themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quantcli.errors import UsageError
from quantcli.plan.filetypes import type_of_bits
from quantcli.plan.recipe import FIELDS, Recipe, merge_recipe
from quantcli.plan.schemes import GGUF, has_types

BEST = "best"
"""The method that stands for whichever was measured to win."""
USUAL_ROUNDER = "gptq"
"""The rounder where no method is named."""
QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {},
    "good": {"method": "nearest", "allocate": True},
    "high": {"method": USUAL_ROUNDER, "allocate": True},
    "max": {
        "method": USUAL_ROUNDER, "allocate": True, "tune": "e2e", "e2e_steps": 300,
        "random_share": 0.25, "sample_share": 0.35,
    },
}  # fmt: skip
"""What each level stands for where an output is made of types; a layout takes the method alone."""

TOWER_TYPE = "F16"
"""The type of a tower where none is named: towers are small, and what they see is lost for good."""


def resolve_recipe(base: Recipe, *, quality: str | None = None, **fields: Any) -> Recipe:
    """``base`` with the given fields, as `merge_recipe` puts them together.

    ``bits`` becomes a type for an output that is made of types; ``quality`` becomes what
    `QUALITIES` has, and ``method="best"`` what is there for "high". UsageError for an unknown name
    or number, and for bits beside a type.
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
    level = quality if recipe.method is None else None
    if recipe.method is not None and recipe.method.strip().lower() == BEST:
        level = "high"
    if level in (None, "fast"):
        return recipe
    stands_for = QUALITIES[level or ""]
    if not has_types(recipe.to):
        return merge_recipe(recipe, method=stands_for["method"])
    # What was given itself wins.
    own = {name for name in stands_for if getattr(recipe, name) != FIELDS[name].default}
    given = {name: value for name, value in stands_for.items() if name not in own - {"method"}}
    return merge_recipe(recipe, **given)


def remark_on_quality(quality: str | None, layouts: Iterable[str]) -> str | None:
    """What a level leaves out for some of these layouts, if it does."""
    without = sorted({to for to in layouts if not has_types(to)})
    if quality not in ("good", "high", "max") or not without:
        return None
    less = "no schemes are chosen" + (" and no codes trained" if quality == "max" else "")
    return (
        f"--quality {quality} for --to {without[0]} is --method {QUALITIES[quality]['method']} "
        f"alone: {less}; for a GGUF they are"
    )
