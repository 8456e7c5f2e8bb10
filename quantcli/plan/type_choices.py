"""The types that tensors of a GGUF may be given, and the bytes of each."""

from __future__ import annotations

from collections.abc import Sequence

from quantcli.formats import get_format
from quantcli.plan.allocate import Choice
from quantcli.plan.layer_overrides import resolve_keep
from quantcli.plan.names import EMBEDDING_NAME, HEAD_NAME
from quantcli.plan.patterns import first_match, parse_tensor_type
from quantcli.plan.planner import Plan

TYPES = (
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K",
    "Q6_K", "Q8_0",
)  # fmt: skip
"""Types to choose from, unless a recipe names others."""

LOWEST = ("IQ1_S", "IQ1_M")
"""Types below them, for a file that has one of these without a choice."""


def usual_types(plan: Plan) -> tuple[str, ...]:
    """The types to choose from where none are named."""
    low = any(item.format in LOWEST for item in plan.items)
    return (*LOWEST, *TYPES) if low else TYPES


def find_type_choices(
    plan: Plan, types: Sequence[str] = TYPES, *, padded: bool = True
) -> list[Choice]:
    """For every matrix, or stack, that the plan rounds by importance: its own type and what fits.

    A tensor whose type the recipe asks for by name has no choice. Sizes are ``padded`` as in the
    file.
    """
    recipe = plan.recipe
    kept = resolve_keep(recipe.keep, [item.tensor for item in plan.items])
    patterns = (*map(parse_tensor_type, recipe.tensor_types), *kept.tensor_types)
    names = {item.tensor.name for item in plan.items}
    asked = set()
    if recipe.output_tensor_type or kept.head:
        asked.add(HEAD_NAME if HEAD_NAME in names else EMBEDDING_NAME)
    if recipe.token_embedding_type or kept.embeddings:
        asked.add(EMBEDDING_NAME)

    def size(rows: int, columns: int, kind: str) -> int:
        nbytes = rows * get_format(kind).row_bytes(columns)
        return plan.aligned(nbytes) if padded else nbytes

    return [
        Choice(
            item.tensor.name,
            item.format,
            {
                kind: size(item.tensor.rows, item.tensor.columns, kind)
                for kind in dict.fromkeys((item.format, *types))
                if get_format(kind).fits(item.tensor.columns)
            },
            (item.tensor.name,),
        )
        for item in plan.items
        if item.importance
        and len(item.tensor.shape) > 1
        and get_format(item.format).block > 1
        and item.tensor.name not in asked
        and first_match(patterns, item.tensor.name) is None
    ]
