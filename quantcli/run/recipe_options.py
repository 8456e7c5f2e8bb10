"""What a recipe asks of methods: the options, and what does not go together."""

from __future__ import annotations

from quantcli.errors import UsageError
from quantcli.plan.recipe import FIELDS, Recipe, given_fields
from quantcli.plan.recipe_defaults import USUAL_ROUNDER
from quantcli.plan.recipe_field import METHOD
from quantcli.plan.schemes import has_types
from quantcli.rounding.nearest import NEAREST
from quantcli.rounding.options import BLOCK_SWEEPS, DECLARED, Options
from quantcli.run.methods import Chain, missing_reader, parse_methods, with_method


def check_methods(recipe: Recipe, *, resume: bool = False) -> None:
    """UsageError for methods that do not fit the output or the other fields, or that are missing.

    The recipe names some. ``resume`` is whether an interrupted run of them is to be continued.
    """
    chain = parse_methods(recipe.method or USUAL_ROUNDER)
    if resume and not chain.rounds:
        raise UsageError(
            f"--method {recipe.method} leaves nothing to resume", hint="run it again without"
        )
    for field, _ in given_fields(recipe):
        method = field.of_method
        if field.section is METHOD and hasattr(Options, field.name):
            method = missing_reader(chain, field.name)
        if method is not None and method not in chain.names:
            names = with_method(chain, method).names
            raise UsageError(
                f"{field.flag} belongs to the method {method}",
                hint=f"--method {','.join(names)}",
            )
        if field.of_field is not None and getattr(recipe, field.of_field) is None:
            needed = f"{FIELDS[field.of_field].flag} {FIELDS[field.of_field].metavar}"
            raise UsageError(f"{field.flag} belongs to {needed}", hint=f"add {needed}")
    _check_chain(recipe, chain)
    read_options(recipe).check()


def _check_chain(recipe: Recipe, chain: Chain) -> None:
    if recipe.tune is not None and not chain.rounds:
        raise UsageError(
            f"--tune {recipe.tune} trains what a method has rounded, and --method {recipe.method} "
            "only transforms",
            hint=f"--method {recipe.method},{USUAL_ROUNDER}",
        )
    if recipe.range is not None and chain.rounds:
        raise UsageError(
            f"--range is not for --method {recipe.method}, which finds ranges by itself",
            hint="leave one out",
        )
    if recipe.imatrix:
        raise UsageError(
            "--method runs the model itself and takes no importance matrix",
            hint="give it the text with --calibrate instead of --imatrix",
        )
    if recipe.to != "gguf" and (chain.trainer or (chain.rounds and has_types(recipe.to))):
        rounder = None if has_types(recipe.to) else chain.rounder
        fits = ",".join(Chain(chain.transforms, rounder).names)
        raise UsageError(
            f"--method {recipe.method} is not for --to {recipe.to}",
            hint=f"--method {fits}" if fits else "for: gguf",
        )


def read_options(recipe: Recipe) -> Options:
    """The recipe's options of methods, defaults filled in."""
    chain = parse_methods(recipe.method or USUAL_ROUNDER)
    given = {name: getattr(recipe, name) for name in DECLARED}
    return Options(
        block_sweeps=0 if recipe.sweeps == 0 else BLOCK_SWEEPS,
        propagate=recipe.propagate,
        rounder=chain.rounder or NEAREST.name,
        trainer=chain.trainer,
        e2e=recipe.tune is not None,
        e2e_codes=recipe.tune != "e2e-scales",
        **{name: value for name, value in given.items() if value is not None},
    )
