"""What a recipe says about methods: its options, and what it asks for that does not go together."""

from __future__ import annotations

from typing import Any

from quantcli.errors import UsageError
from quantcli.plan.recipe import Recipe
from quantcli.plan.schemes import has_types
from quantcli.rounding.options import Options
from quantcli.run.methods import ROUNDER, TUNER, parse_methods


def check_methods(recipe: Recipe) -> None:
    """UsageError for methods that do not fit the output or the recipe's other fields.

    The recipe names a method.
    """
    named = recipe.method or ROUNDER
    chain = parse_methods(named)
    if recipe.tune_steps is not None and not chain.tune:
        raise UsageError(
            "--tune-steps belongs to the method tune", hint=f"--method {named},{TUNER}"
        )
    if (recipe.allocate or recipe.target_size) and not chain.feedback:
        raise UsageError(
            "types are chosen for gptq, which is not among the methods",
            hint=f"--method {ROUNDER}",
        )
    if recipe.tune is not None and not chain.rounds:
        raise UsageError(
            f"--tune {recipe.tune} trains what a method has rounded, and --method {named} "
            "only transforms",
            hint=f"--method {named},{ROUNDER}",
        )
    if recipe.e2e_steps is not None and recipe.tune is None:
        raise UsageError("--e2e-steps belongs to --tune e2e", hint="add --tune e2e")
    if recipe.range is not None and chain.rounds:
        raise UsageError(
            f"--range is not for --method {named}, which finds ranges by itself",
            hint="leave one out",
        )
    if recipe.imatrix:
        raise UsageError(
            "--method runs the model itself and takes no importance matrix",
            hint="give it the text with --calibrate instead of --imatrix",
        )
    if recipe.to != "gguf" and (chain.tune or (chain.rounds and has_types(recipe.to))):
        rounds = chain.feedback and not has_types(recipe.to)
        fits = ",".join([*chain.transforms, *([ROUNDER] if rounds else [])])
        raise UsageError(
            f"--method {named} is not for --to {recipe.to}",
            hint=f"--method {fits}" if fits else "for: gguf",
        )
    read_options(recipe).check()


def read_options(recipe: Recipe) -> Options:
    """The recipe's options of methods, defaults filled in."""
    chain = parse_methods(recipe.method or ROUNDER)
    named: dict[str, Any] = {
        "feedback": chain.feedback,
        "tune": chain.tune,
        "tune_steps": recipe.tune_steps,
        "damping": recipe.damping,
        "order": recipe.column_order,
        "sweeps": recipe.sweeps,
        "block_sweeps": 0 if recipe.sweeps == 0 else None,
        "fisher_windows": recipe.fisher_windows,
        "propagate": recipe.propagate or None,
        "e2e": recipe.tune is not None,
        "e2e_steps": recipe.e2e_steps,
    }
    return Options(**{name: value for name, value in named.items() if value is not None})
