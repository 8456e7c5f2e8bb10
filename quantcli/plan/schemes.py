"""What a recipe means for a model folder: which grid, within what its layout can hold.

Whatever is wrong by itself is refused here, before a model is opened; what does not fit a model's
shapes is refused by `quantcli.plan.folders`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantcli.errors import UsageError
from quantcli.formats.integer import IntegerGrid, Search, Strategy
from quantcli.layouts import LAYOUTS, OF_RUNTIMES, find_layout
from quantcli.layouts.base import CodeGrid, Grids, Layout, Packing, is_static
from quantcli.plan.layer_overrides import parse_keep
from quantcli.plan.recipe import FIELDS, Recipe, given_fields
from quantcli.plan.recipe_field import Field
from quantcli.registry import near

GGUF = "gguf"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Our name of a dtype, and config.json's."""

_GGUF_TAKES = frozenset(
    {"types", "gguf", "method", "allocation", "training", "keep", "range", "statistics"}
)
INTEGERS = re.compile(r"W(\d)A16(?:_(G\d+|CHANNEL|TENSOR))?(?:_(ASYM|SYM))?", re.IGNORECASE)
"""The name of integers for which there is no preset."""
_RANGES: dict[str, Search] = {"minmax": "minmax", "mse": "mse", "imatrix": "mse"}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How some matrices of a model folder are made: a grid, its packing, and how scales are found.

    ``label`` is what a table calls them, such as "int4 g128". ``inputs`` are the settings of
    activations that a runtime quantizes, None for floats. ``groups`` are the other sizes of groups
    that the layout has, () for any, and ``strategies`` wider spans of a scale.
    """

    layout: Layout
    label: str
    grid: CodeGrid
    packing: Packing
    search: Search
    weighted: bool
    inputs: Mapping[str, Any] | None = None
    groups: tuple[int, ...] = ()
    strategies: tuple[Strategy, ...] = ()

    @property
    def is_static(self) -> bool:
        """Whether activations have scales that are found beforehand, on texts."""
        return is_static(self.inputs)

    @property
    def narrows_inputs(self) -> bool:
        """Whether that scale is not that of the extremes, but the one of least squared error."""
        static = self.is_static and self.inputs is not None
        return static and self.search == "mse" and (self.inputs or {}).get("type") == "int"

    @property
    def described_inputs(self) -> Mapping[str, Any] | None:
        """What config.json says of activations."""
        if self.inputs is None or not self.narrows_inputs:
            return self.inputs
        return {**self.inputs, "observer": "mse"}

    @property
    def has_zero_points(self) -> bool:
        """Whether activations have zero points."""
        return self.inputs is not None and not self.inputs["symmetric"]


UNQUANTIZED = "UNQUANTIZED"
"""compressed-tensors' name of the scheme of modules that stay as they are."""


@dataclass(frozen=True, slots=True)
class SchemeRule:
    """A scheme for the linear modules whose name ``pattern`` finds; None: for all others.

    Without a scheme they stay as they are.
    """

    pattern: str | None
    scheme: Scheme | None

    @property
    def label(self) -> str:
        """The scheme's name."""
        return UNQUANTIZED if self.scheme is None else self.scheme.label


def output_formats() -> list[str]:
    """What a recipe's ``to`` may be."""
    return [GGUF, *LAYOUTS]


def find_output_layout(to: str) -> Layout | None:
    """The layout of a recipe's ``to``, None for a GGUF; UsageError when there is no such format."""
    if to == GGUF:
        return None
    names = output_formats()
    if to not in names:
        guesses = [OF_RUNTIMES[to.lower()]] if to.lower() in OF_RUNTIMES else []
        guesses = guesses or near(to, names, most=1)
        hint = f"did you mean {guesses[0]}?" if guesses else "known: " + ", ".join(names)
        raise UsageError(f"there is no output format named {to!r}", hint=hint)
    return find_layout(to)


def has_types(to: str) -> bool:
    """Whether the format is made of GGUF's block types rather than of an integer grid."""
    layout = find_output_layout(to)
    return layout is None or not layout.has_codes


def is_taken(field: Field, layout: Layout | None) -> bool:
    """Whether a layout, or with None a GGUF, takes the field of a recipe."""
    return field.is_taken(_GGUF_TAKES if layout is None else layout.takes)


def targets_of(field: Field) -> list[str]:
    """The output formats that take the field of a recipe."""
    found = [GGUF] if is_taken(field, None) else []
    return found + [layout.name for layout in LAYOUTS.usable() if is_taken(field, layout)]


def check_scheme(recipe: Recipe) -> None:
    """UsageError for fields that the target does not take, and for a grid that it cannot hold."""
    layout = find_output_layout(recipe.to)
    for field, _ in given_fields(recipe):
        if not is_taken(field, layout):
            what = f"{field.flag} is" if field.name != "bits" else "a recipe's bits are"
            raise UsageError(
                f"{what} not for --to {recipe.to}", hint=f"for: {', '.join(targets_of(field))}"
            )
    for entry in recipe.keep:
        if recipe.to == GGUF:
            parse_keep(entry)
            continue
        try:
            re.compile(entry)
        except re.error as error:
            raise UsageError(f"--keep {entry} is not a regular expression: {error}") from None
    if recipe.dtype is not None and recipe.dtype not in DTYPES:
        raise UsageError(f"--dtype {recipe.dtype} is not one of {', '.join(DTYPES)}")
    if layout is not None and layout.has_codes:
        make_schemes(recipe, "BF16", has_importance=knows_importance(recipe))
    elif recipe.range is not None:
        # An importance matrix may be for other tensors than those whose ranges are chosen.
        _search(recipe, recipe.range == "imatrix" and knows_importance(recipe))


def knows_importance(recipe: Recipe) -> bool:
    """Whether ranges will be weighted: by a file, or by what a method measures."""
    measured = recipe.method is not None and recipe.range in (None, "imatrix")
    return recipe.imatrix is not None or measured


def has_static_scales(recipe: Recipe) -> bool:
    """Whether some scales are found beforehand, by running the model on texts."""
    layout = find_output_layout(recipe.to)
    if layout is None or not layout.has_codes:
        return False
    rules = make_schemes(recipe, "BF16", has_importance=knows_importance(recipe))
    found = any(rule.scheme is not None and rule.scheme.is_static for rule in rules)
    return found or recipe.kv_cache is not None


def find_grids(recipe: Recipe) -> tuple[Layout, Grids]:
    """The layout of a recipe and its grids; UsageError when there are none."""
    layout = find_output_layout(recipe.to)
    if layout is None or layout.grids is None:
        raise UsageError(f"--to {recipe.to} has no integer grid")
    if recipe.activations is None:
        return layout, layout.grids
    if recipe.activations not in layout.activations:
        raise UsageError(
            f"--activations {recipe.activations} is not known",
            hint="known: "
            + ", ".join(dict.fromkeys([*layout.activations, *(k for k, _ in layout.shorthands)])),
        )
    return layout, layout.activations[recipe.activations]


def find_shorthand(recipe: Recipe) -> tuple[Layout, str] | None:
    """The preset that a recipe's activations and bits stand for; UsageError for other bits."""
    layout = find_output_layout(recipe.to)
    if layout is None or recipe.activations is None:
        return None
    bits = [number for kind, number in layout.shorthands if kind == recipe.activations]
    if not bits or (recipe.bits not in bits and recipe.activations in layout.activations):
        return None
    number = max(bits) if recipe.bits is None else recipe.bits
    if number not in bits:
        raise UsageError(
            f"--to {recipe.to} has no {number}-bit weights with {recipe.activations} activations",
            hint=f"it has {' and '.join(map(str, bits))}",
        )
    for name in ("group_size", "symmetric"):
        if getattr(recipe, name) is not None:
            raise UsageError(
                f"{FIELDS[name].flag} is not for --bits {number} --activations "
                f"{recipe.activations}",
                hint=f"it is the scheme {layout.shorthands[recipe.activations, number]}",
            )
    return layout, layout.shorthands[recipe.activations, number]


def scheme_name(recipe: Recipe) -> str:
    """What a folder's name says of its weights: "4bit", "w8a8", "fp8_block", "mixed", "5.5bpw"."""
    if recipe.target_bpw is not None:
        return f"{recipe.target_bpw:g}bpw"
    if recipe.target_size is not None:
        return "mixed"
    layout, short = find_output_layout(recipe.to), find_shorthand(recipe)
    named = [split_scheme(entry)[1] for entry in recipe.scheme]
    if short is not None:
        named = [short[1]]
    elif layout is not None and layout.grids is None:
        named = named or list(layout.presets)[:1]
    if named:
        return named[0].lower() if len(named) == 1 else "mixed"
    if recipe.activations:
        kinds = recipe.activations.split(":")[1:]
        return "_".join(["w8a8", *(kind.replace("asymmetric", "asym") for kind in kinds)])
    return f"{recipe.bits or find_grids(recipe)[1].usual_bits}bit"


def make_schemes(recipe: Recipe, dtype: str, *, has_importance: bool) -> tuple[SchemeRule, ...]:
    """The schemes of a folder for a model of that dtype ("BF16", "F16", "F32"), the first first.

    Where they are named for some modules alone, the others are not quantized, unless bits are
    given.
    """
    layout = find_output_layout(recipe.to)
    if layout is None or not layout.has_codes:
        raise UsageError(f"--to {recipe.to} has no schemes")
    named = recipe.scheme or (() if layout.grids is not None else tuple(layout.presets)[:1])

    def find(name: str) -> Scheme | None:
        if name.upper() == UNQUANTIZED and layout.grids is not None and layout.caches:
            return None
        return find_scheme(recipe, layout, name, dtype, has_importance)

    rules = [SchemeRule(pattern, find(name)) for pattern, name in map(split_scheme, named)]
    if any(rule.pattern is None for rule in rules[:-1]):
        raise UsageError("--scheme without a pattern comes last, since it is for all other modules")
    if rules and rules[-1].pattern is None:
        for name in ("bits", "group_size", "symmetric", "activations"):
            if getattr(recipe, name) is not None:
                raise UsageError(
                    f"{FIELDS[name].flag} and --scheme {rules[-1].label} both say what "
                    "weights become",
                    hint="leave one out",
                )
    if not rules or (recipe.bits is not None and rules[-1].pattern is not None):
        rules.append(SchemeRule(None, make_scheme(recipe, dtype, has_importance=has_importance)))
    if recipe.kv_cache is None and all(rule.scheme is None for rule in rules):
        raise UsageError(
            f"--scheme {UNQUANTIZED} alone quantizes nothing", hint="add --kv-cache, or a scheme"
        )
    return tuple(rules)


def split_scheme(entry: str) -> tuple[str | None, str]:
    """The pattern and the name of "PATTERN=NAME" or "NAME"; UsageError for no expression."""
    pattern, equals, name = entry.rpartition("=")
    if not equals:
        return None, name
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--scheme {entry}: no regular expression: {error}") from None
    return pattern, name


def find_scheme(
    recipe: Recipe, layout: Layout, name: str, dtype: str, has_importance: bool
) -> Scheme:
    """The scheme of that name: a preset, or integers such as "W4A16_G64"; UsageError for neither.

    The name of integers gives bits and, where they are not the layout's usual ones, what shares a
    scale ("G64", "CHANNEL") and zero points ("ASYM", "SYM").
    """
    found = INTEGERS.fullmatch(name)
    if name.upper() in layout.presets or found is None or layout.grids is None:
        return make_preset(recipe, layout, name, dtype, has_importance)
    bits, group, zero = found.groups()
    size: int | str | None = None
    if group is not None:
        size = group[1:] if group[1:].isdigit() else group.lower()
    plain = replace(
        recipe, bits=int(bits), group_size=size, activations=None, scheme=(),
        symmetric=None if zero is None else zero.upper() == "SYM",
    )  # fmt: skip
    return make_scheme(plain, dtype, has_importance=has_importance)


def scheme_title(scheme: Scheme) -> str | None:
    """The name by which `find_scheme` finds it; None where it has none."""
    grid, grids = scheme.grid, scheme.layout.grids
    if scheme.label in scheme.layout.presets:
        return scheme.label
    same = [
        preset.name
        for preset in scheme.layout.presets.values()
        if (preset.grid.label, preset.grid.zero, preset.inputs, preset.packing)
        == (grid.label, grid.zero, scheme.inputs, scheme.packing)
    ]
    if same:
        return same[0]
    if not isinstance(grid, IntegerGrid) or grids is None or scheme.inputs is not None:
        return None
    usual = grid.group_size == grids.group or grid.strategy == grids.group
    spread = f"G{grid.group_size}" if grid.strategy == "group" else grid.strategy.upper()
    zero = "SYM" if grid.symmetric else "ASYM"
    is_usual = grid.zero == (grids.symmetric or grids.asymmetric)
    parts = [f"W{grid.bits}A16", *([] if usual else [spread]), *([] if is_usual else [zero])]
    return "_".join(parts)


def make_preset(
    recipe: Recipe, layout: Layout, name: str, dtype: str, has_importance: bool
) -> Scheme:
    """The scheme of a layout's preset; UsageError with near names when there is none."""
    known = {preset.casefold(): preset for preset in layout.presets}
    if name.casefold() not in known:
        guesses = near(name, layout.presets)
        every = ", ".join(layout.presets) or "it has integers alone, such as W4A16"
        hint = f"did you mean {' or '.join(guesses)}?" if guesses else every
        raise UsageError(f"--to {layout.name} has no scheme {name!r}", hint=hint)
    preset = layout.presets[known[name.casefold()]]
    grid = preset.grid if preset.grid.scale_dtype else replace(preset.grid, scale_dtype=dtype)
    if recipe.range is None and not has_importance:
        search, weighted = preset.search, False
    else:
        search, weighted = _search(recipe, has_importance)
    return Scheme(
        layout, preset.name, grid, preset.packing, search, weighted, preset.inputs,
        (grid.group_size or 0,),
    )  # fmt: skip


def make_scheme(recipe: Recipe, dtype: str, *, has_importance: bool) -> Scheme:
    """The grid of a layout for a model of that dtype ("BF16", "F16", "F32")."""
    short = find_shorthand(recipe)
    if short is not None:
        return make_preset(recipe, *short, dtype, has_importance)
    layout, grids = find_grids(recipe)
    what = f" with {recipe.activations} activations" if recipe.activations else ""
    bits = recipe.bits or grids.usual_bits
    if bits not in grids.bits:
        raise UsageError(
            f"--to {recipe.to} has no {bits}-bit weights{what}",
            hint=f"it has {', '.join(map(str, grids.bits))}",
        )
    zero = grids.symmetric or grids.asymmetric
    if recipe.symmetric is not None:
        zero = grids.symmetric if recipe.symmetric else grids.asymmetric
    if zero is None:
        word = "symmetric" if recipe.symmetric else "asymmetric"
        raise UsageError(f"--to {recipe.to}{what} has no {word} weights", hint="leave it out")
    strategy, size = _group(recipe, grids)
    search, weighted = _search(recipe, has_importance)
    grid = IntegerGrid(
        bits, zero, strategy, size, grids.scale_dtype or dtype,
        lowest_zero=grids.lowest_zero if zero == "integer" else 0,
    )  # fmt: skip
    kind = "" if grid.symmetric or grids.symmetric is None else " asymmetric"
    label = grid.label + kind
    if recipe.activations:
        label += f" + {recipe.activations.replace(':', ' ')} activations"
    return Scheme(
        layout, label, grid, grids.packing, search, weighted, grids.inputs, grids.groups or (),
        grids.strategies,
    )  # fmt: skip


def _group(recipe: Recipe, grids: Grids) -> tuple[Strategy, int | None]:
    wanted = grids.group if recipe.group_size is None else recipe.group_size
    if isinstance(wanted, str) and wanted.isdigit():
        wanted = int(wanted)
    if isinstance(wanted, int) and grids.has_group(wanted):
        return "group", wanted
    for strategy in grids.strategies:
        if wanted == strategy:
            return strategy, None
    sizes = [] if grids.groups is None else [*map(str, grids.groups)] or ["a multiple of 8"]
    raise UsageError(
        f"--group-size {wanted} is not for --to {recipe.to}",
        hint=f"one of: {', '.join([*sizes, *grids.strategies])}",
    )


def _search(recipe: Recipe, has_importance: bool) -> tuple[Search, bool]:
    wanted = recipe.range or ("imatrix" if has_importance else "mse")
    if wanted not in _RANGES:
        raise UsageError(f"--range {wanted} is not one of {', '.join(_RANGES)}")
    if wanted == "imatrix" and not has_importance:
        raise UsageError(
            "--range imatrix needs an importance matrix", hint="give it with --imatrix"
        )
    if wanted != "imatrix" and has_importance:
        raise UsageError(
            f"--range {wanted} does not use an importance matrix", hint="leave one out"
        )
    return _RANGES[wanted], wanted == "imatrix"
