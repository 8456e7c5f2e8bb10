"""What a recipe means for a model folder: which grid, within what the target's layout can hold.

One line of `TARGETS` for each ``--to``: its bits, group sizes and zero points, and which of a
recipe's fields it takes. Whatever is wrong by itself is refused here, before a model is opened;
what does not fit a model's shapes is refused by `quantcli.plan.folders`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantcli.errors import UsageError
from quantcli.formats.integer import IntegerGrid, Search, Zero
from quantcli.layouts.packing import awq, gptq, mlx
from quantcli.plan.layer_overrides import parse_keep
from quantcli.plan.recipe import Recipe, given_fields
from quantcli.plan.recipe_field import Field
from quantcli.registry import near

CHANNEL, TENSOR = "channel", "tensor"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Our name of a dtype, and config.json's."""

_GRID = frozenset({"bits", "grid", "method", "keep", "dtype"})


@dataclass(frozen=True, slots=True)
class Target:
    """An output format: what it takes of a recipe, and the grids that it holds.

    ``takes`` names sections of `quantcli.plan.recipe_field` and single fields. ``symmetric`` and
    ``asymmetric`` are the grids' zero points, None where there is no such grid; the first that is
    there is the default. ``groups`` empty means any size.
    """

    takes: frozenset[str]
    bits: tuple[int, ...] = ()
    symmetric: Zero | None = None
    asymmetric: Zero | None = None
    group: int = 128
    groups: tuple[int, ...] = ()
    strategies: tuple[str, ...] = ()
    scale_dtype: str | None = None
    """Of scales; None: the model's own."""
    lowest_zero: int = 0
    embeddings: bool = False
    """Whether the embedding and the head are quantized too."""
    stacked: bool = False
    """Whether a layer's experts are one tensor."""


_GPTQ = Target(
    _GRID, gptq.BITS, "middle", "integer", strategies=(CHANNEL,), scale_dtype="F16", lowest_zero=1
)
TARGETS: Mapping[str, Target] = {
    "gguf": Target(frozenset({"types", "gguf", "method", "allocation", "training", "keep"})),
    "hf": Target(frozenset({"types", "method", "dtype"})),
    "compressed-tensors": Target(
        _GRID | {"activations"}, tuple(range(2, 9)), "middle", "integer",
        strategies=(CHANNEL, TENSOR),
    ),
    "gptq": _GPTQ,
    "gptq-v2": Target(
        _GRID, gptq.BITS, "middle", "integer", strategies=(CHANNEL,), scale_dtype="F16"
    ),
    "awq": Target(
        _GRID, (awq.BITS,), None, "integer", strategies=(CHANNEL,), scale_dtype="F16"
    ),
    "mlx": Target(
        _GRID, mlx.BITS, None, "edge", group=64, groups=mlx.GROUPS, embeddings=True, stacked=True
    ),
}  # fmt: skip

_RANGES: dict[str, Search] = {"minmax": "minmax", "mse": "mse", "imatrix": "mse"}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a model folder is made: its target, the grid, how ranges are found, and W8A8."""

    to: str
    grid: IntegerGrid
    search: Search
    weighted: bool
    activations: bool

    @property
    def label(self) -> str:
        """What a table calls the quantized tensors, such as "int4 g128"."""
        grid = self.grid
        spread = f"g{grid.group_size}" if grid.strategy == "group" else grid.strategy
        kind = "" if grid.symmetric or self.to in ("awq", "mlx") else " asymmetric"
        return f"int{grid.bits} {spread}{kind}" + (
            " + int8 activations" if self.activations else ""
        )


def find_target(name: str) -> Target:
    """The output format of that name; UsageError with near names when there is none."""
    if name not in TARGETS:
        guesses = near(name, TARGETS, most=1)
        hint = f"did you mean {guesses[0]}?" if guesses else "known: " + ", ".join(TARGETS)
        raise UsageError(f"there is no output format named {name!r}", hint=hint)
    return TARGETS[name]


def has_types(to: str) -> bool:
    """Whether the format is made of GGUF's block types rather than of an integer grid."""
    return "types" in find_target(to).takes


def targets_of(field: Field) -> list[str]:
    """The output formats that take the field of a recipe."""
    return [name for name, target in TARGETS.items() if field.is_taken(target.takes)]


def check_scheme(recipe: Recipe) -> None:
    """UsageError for fields that the target does not take, and for a grid that it cannot hold."""
    target = find_target(recipe.to)
    for field, _ in given_fields(recipe):
        if not field.is_taken(target.takes):
            what = f"{field.flag} is" if field.name != "bits" else "a recipe's bits are"
            raise UsageError(
                f"{what} not for --to {recipe.to}", hint=f"for: {', '.join(targets_of(field))}"
            )
    for entry in recipe.keep:
        if recipe.to == "gguf":
            parse_keep(entry)
            continue
        try:
            re.compile(entry)
        except re.error as error:
            raise UsageError(f"--keep {entry} is not a regular expression: {error}") from None
    if recipe.dtype is not None and recipe.dtype not in DTYPES:
        raise UsageError(f"--dtype {recipe.dtype} is not one of {', '.join(DTYPES)}")
    if not has_types(recipe.to):
        make_scheme(recipe, "BF16", has_importance=knows_importance(recipe))


def knows_importance(recipe: Recipe) -> bool:
    """Whether ranges will be weighted: by a file, or by what a method measures."""
    measured = recipe.method is not None and recipe.range in (None, "imatrix")
    return recipe.imatrix is not None or measured


def make_scheme(recipe: Recipe, dtype: str, *, has_importance: bool) -> Scheme:
    """The grid of an integer target for a model of that dtype ("BF16", "F16", "F32")."""
    target = find_target(recipe.to)
    activations = _activations(recipe)
    bits = recipe.bits or (8 if activations else 4)
    if bits not in target.bits or (activations and bits != 8):
        known = "8" if activations else ", ".join(map(str, target.bits))
        suffix = " with int8 activations" if activations else ""
        raise UsageError(
            f"--to {recipe.to} has no {bits}-bit weights{suffix}", hint=f"it has {known}"
        )
    zero = _zero(recipe, target, activations)
    strategy, size = _group(recipe, target, activations)
    search, weighted = _search(recipe, has_importance)
    grid = IntegerGrid(
        bits, zero, strategy, size, target.scale_dtype or dtype,
        lowest_zero=target.lowest_zero if zero == "integer" else 0,
    )  # fmt: skip
    return Scheme(recipe.to, grid, search, weighted, activations)


def _activations(recipe: Recipe) -> bool:
    if recipe.activations not in (None, "int8"):
        raise UsageError(f"--activations {recipe.activations} is not known", hint="int8 is")
    return recipe.activations is not None


def _zero(recipe: Recipe, target: Target, activations: bool) -> Zero:
    asymmetric = None if activations else target.asymmetric
    if recipe.symmetric is None:
        chosen = target.symmetric or asymmetric
    else:
        chosen = target.symmetric if recipe.symmetric else asymmetric
    if chosen is None:
        word = "symmetric" if recipe.symmetric else "asymmetric"
        with_ = " with int8 activations" if activations else ""
        raise UsageError(f"--to {recipe.to}{with_} has no {word} weights", hint="leave it out")
    return chosen


def _group(recipe: Recipe, target: Target, activations: bool) -> tuple[Any, int | None]:
    wanted = recipe.group_size
    if wanted is None:
        wanted = CHANNEL if activations else target.group
    if isinstance(wanted, str) and wanted.isdigit():
        wanted = int(wanted)
    if isinstance(wanted, int) and not activations:
        if wanted in target.groups or (not target.groups and wanted >= 8 and wanted % 8 == 0):
            return "group", wanted
        sizes = ", ".join(map(str, target.groups)) or "a multiple of 8"
    elif wanted in target.strategies:
        return wanted, None
    else:
        sizes = "" if activations else ", ".join(map(str, target.groups)) or "a multiple of 8"
    allowed = ", ".join(filter(None, (sizes, *target.strategies)))
    raise UsageError(
        f"--group-size {wanted} is not for --to {recipe.to}", hint=f"one of: {allowed}"
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
