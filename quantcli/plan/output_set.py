"""Several outputs of one run: lists of types, bits and layouts, and the named sets of types.

Each output has a recipe of its own, the same that it would have alone, so that its file is the same
too. What is common stands once: a list of types, bits or layouts stands for as many recipes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantcli.errors import UsageError
from quantcli.plan.filetypes import file_types, find_file_type, type_of_bits
from quantcli.plan.recipe import FIELDS, Recipe
from quantcli.plan.recipe_defaults import remark_on_quality, resolve_recipe
from quantcli.plan.schemes import GGUF, find_output_layout, has_types, is_taken
from quantcli.registry import near

SETS: Mapping[str, tuple[str, ...]] = {
    "popular": (
        "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_L", "Q3_K_M",
        "Q3_K_S", "IQ3_XXS", "Q2_K", "IQ2_M",
    ),
    "small": (
        "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_XS", "IQ3_XXS", "Q2_K", "IQ2_M",
        "IQ2_S", "IQ2_XS", "IQ2_XXS",
    ),
    "all": (
        "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
        "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS",
        "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
    ),
}  # fmt: skip
"""Named sets, finest first: what most publishers offer, what is below four and a half bits, and
every type but those of models that were trained in them (ternary, MXFP4, NVFP4)."""

_MOST_VALUES = 200
"""Of a list: there are fewer types than that."""
SEVERAL = tuple(name for name, field in FIELDS.items() if field.several)
"""The fields of which each value makes an output of its own."""


@dataclass(frozen=True, slots=True)
class Output:
    """One output: how it is made, and its name where that is not made of model and recipe.

    ``bits`` are those that were asked for, whatever type they stand for.
    """

    recipe: Recipe
    bits: int | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class OutputSet:
    """The outputs, and the types of a named set that are left out without an importance matrix."""

    outputs: tuple[Output, ...]
    left_out: tuple[str, ...] = ()
    remark: str | None = None
    """On a quality that some outputs do not have in full."""


def expand_outputs(
    bases: Sequence[Output], *, output_set: str | None = None, quality: str | None = None,
    has_texts: bool = False, **fields: Any,
) -> OutputSet:  # fmt: skip
    """``bases`` with the given fields, of which `SEVERAL` may hold several values.

    ``output_set`` names one of `SETS`; types of it that need an importance matrix are left out
    where there is none, neither a file nor texts. UsageError for what is unknown, given twice or
    stands for nothing.
    """
    values = {name: split_values(name, fields.pop(name, None)) for name in SEVERAL}
    left: tuple[str, ...] = ()
    if output_set is not None and values["bits"] and not values["to"]:
        names = ",".join(type_of_bits(int(bits)) for bits in values["bits"])
        raise UsageError(
            "--bits and --set exclude each other", hint=f"--set {output_set} --type {names} adds it"
        )
    if output_set is not None:
        has_importance = has_texts or bool(
            fields.get("imatrix")
            or fields.get("method")
            or quality in ("good", "high", "max")
            or all(base.recipe.imatrix or base.recipe.method for base in bases)
        )
        named = find_set(output_set)
        left = () if has_importance else tuple(filter(_needs_importance, named))
        own = {find_file_type(name).name for name in values["type"]}
        values["type"] += [name for name in named if name not in left and name not in own]
    if len(bases) > 1:
        for name, given in values.items():
            if given:
                raise UsageError(
                    f"{FIELDS[name].flag} and a recipe of {len(bases)} outputs exclude each other",
                    hint="leave one of them out",
                )
    layouts = values["to"] or [base.recipe.to for base in bases]
    outputs = tuple(
        Output(
            resolve_recipe(
                base.recipe,
                quality=quality,
                **_taken(fields, chosen.get("to", base.recipe.to), layouts),
                **chosen,
            ),
            chosen.get("bits") or base.bits,
            base.name,
        )
        for base in bases
        for chosen in combine(values, base.recipe.to)
    )
    _refuse_twice(outputs)
    remark = remark_on_quality(quality, [output.recipe.to for output in outputs])
    return OutputSet(outputs, left, remark)


def _taken(fields: Mapping[str, Any], to: str, layouts: Sequence[str]) -> dict[str, Any]:
    """The fields for one of several layouts: not what is only for others of them."""
    if len(set(layouts)) < 2:
        return dict(fields)
    own = find_output_layout(to)
    every = [find_output_layout(layout) for layout in layouts]
    return {
        name: value
        for name, value in fields.items()
        if name not in FIELDS
        or is_taken(FIELDS[name], own)
        or not any(is_taken(FIELDS[name], layout) for layout in every)
    }


def find_set(name: str) -> tuple[str, ...]:
    """The types of a named set; UsageError with the names that there are."""
    known = name.strip().lower()
    if known not in SETS:
        guess = near(name, SETS, most=1)
        hint = f"did you mean {guess[0]}?" if guess else "known: " + ", ".join(SETS)
        raise UsageError(f"there is no set named {name!r}", hint=hint)
    return SETS[known]


def split_values(name: str, given: Any) -> list[Any]:
    """The values of a field that may have several: a list, or a text with commas between them.

    UsageError for an empty one, one given twice, and for bits that are no number.
    """
    parts: list[Any] = []
    for each in given if isinstance(given, list | tuple) else () if given is None else (given,):
        parts += [part.strip() for part in each.split(",")] if isinstance(each, str) else [each]
    flag = FIELDS[name].flag
    if len(parts) > _MOST_VALUES:
        raise UsageError(f"{flag} lists {len(parts):,} values; {_MOST_VALUES} are more than all")
    if "" in parts:
        raise UsageError(f"{flag} has an empty entry", hint="separate entries by one comma")
    found: list[Any] = []
    for part in parts:
        value = part
        if name == "bits" and isinstance(part, str):
            if not part.isdigit():
                kinds = [each.name for each in file_types() if each.name == part.upper()]
                hint = f"--type {kinds[0]}" if kinds else f"{flag} 4, or {flag} 2,4"
                raise UsageError(f"{flag} {part} is not a number", hint=hint)
            value = int(part)
        elif name != "bits" and not isinstance(part, str):
            raise UsageError(f"{flag} lists {part!r}, which is no text")
        elif normalize := FIELDS[name].normalize:
            value = normalize(part)
        if value in found:
            raise UsageError(f"{flag} {value} is given twice", hint="leave one out")
        found.append(value)
    return found


def combine(values: Mapping[str, Sequence[Any]], to: str = GGUF) -> Iterator[dict[str, Any]]:
    """The fields of each output, for the values of each of `SEVERAL`.

    ``to`` is the layout where none is given. Beside types, bits are those of layouts that have
    none.
    """
    layouts = values["to"] or [to]
    typed = [layout for layout in layouts if has_types(layout)]
    for layout in layouts:
        own = {"to": layout} if values["to"] else {}
        mixed = 0 < len(typed) < len(layouts)
        types = values["type"] if layout in typed or not typed else ()
        bits = () if mixed and types else values["bits"]
        # Where both are given, the recipe's check refuses that.
        for kind in types or (None,):
            for number in bits or (None,):
                pairs = {"type": kind, "bits": number}
                yield own | {name: value for name, value in pairs.items() if value is not None}


def _needs_importance(name: str) -> bool:
    return find_file_type(name).needs_importance


def _refuse_twice(outputs: Sequence[Output]) -> None:
    for index, output in enumerate(outputs):
        if output in outputs[:index]:
            what = output.recipe.type if has_types(output.recipe.to) else output.recipe.to
            raise UsageError(f"{what} is asked for twice", hint="leave one out")
