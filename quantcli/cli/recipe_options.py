"""The options of ``quantize`` that are fields of a recipe, made from their declarations."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

from quantcli.cli.options import option, replace_parameters
from quantcli.plan.recipe import FIELDS
from quantcli.plan.recipe_field import SECTIONS, Field

_PLAIN = (bool, int, float, str)


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, in place of its ``**fields``, one option for each field of a recipe.

    An option that is not given arrives as None. They stand before the command's own options, each
    section under its title.
    """
    every = inspect.signature(command, eval_str=True).parameters.values()
    own = [each for each in every if each.kind is not each.VAR_KEYWORD]
    arguments = [each for each in own if each.default is each.empty]
    fields = sorted(FIELDS.values(), key=lambda field: SECTIONS.index(field.section))
    replace_parameters(command, [*arguments, *map(_parameter, fields), *own[len(arguments) :]])
    return command


def _parameter(field: Field) -> inspect.Parameter:
    declared = option(
        *field.flags, help=field.help_text, metavar=field.metavar, panel=field.section.title
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=Annotated[_kind(field) | None, declared],
    )


def _kind(field: Field) -> Any:
    """What the command line reads the text as; the recipe checks what is more than that."""
    if field.several or get_origin(field.kind) is tuple:
        return list[str]
    kinds = [kind for kind in (field.kind, *get_args(field.kind)) if kind in _PLAIN]
    return str if len(kinds) != 1 else kinds[0]
