"""A recipe as a file: strict TOML or YAML in, TOML out.

What `dump_recipe` writes, `load_recipe` reads back as an equal recipe; it is also what an output
file records. Unknown fields, duplicate keys and values of the wrong type are refused with the file
and the field named.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from quantcli.errors import QuantcliError, UsageError
from quantcli.plan.recipe import Recipe, given_fields, make_recipe, refuse_unknown
from quantcli.plan.recipe_check import check_recipe
from quantcli.plan.schemes import has_types
from quantcli.plan.shipped_recipes import find_recipe


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a .toml, .yaml or .yml file, or one that comes with quantcli, by its name.

    UsageError names the file and the field.
    """
    path = find_recipe(Path(path))
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"recipe {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {path}: not UTF-8 at byte {error.start}") from None
    try:
        fields = _parse(content, path.suffix.lower())
        refuse_unknown(fields)
        recipe = make_recipe(fields)
        check_recipe(recipe)
    except QuantcliError as error:
        raise UsageError(f"recipe {path}: {error.message}", hint=error.hint) from None
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML: its type, then what differs from the defaults, in the fields' order.

    A model folder with an integer grid has no type, so its format comes first.
    """
    fields: dict[str, Any] = {"type": recipe.type} if has_types(recipe.to) else {"to": recipe.to}
    fields |= {field.name: value for field, value in given_fields(recipe)}
    return "".join(f"{name} = {_toml(value)}\n" for name, value in fields.items())


def recorded(recipe: Recipe) -> Recipe:
    """The recipe as an output holds it: of files their names alone, wherever they lie here."""
    imatrix, template = (
        None if path is None else Path(path).name for path in (recipe.imatrix, recipe.chat_template)
    )
    return replace(recipe, imatrix=imatrix, chat_template=template)


def _parse(content: str, suffix: str) -> dict[str, Any]:
    if suffix == ".toml":
        try:
            return tomllib.loads(content)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"not TOML: {error}") from None
    if suffix not in (".yaml", ".yml"):
        raise UsageError(
            f"expected a .toml, .yaml or .yml file, found {suffix or 'no suffix'}"
        ) from None
    try:
        fields = yaml.load(content, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UsageError("nested too deeply") from None
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise UsageError(f"expected a table of fields, found {type(fields).__name__}")
    return fields


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which would take the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise UsageError(f"field {twice} is given twice")
        return super().construct_mapping(node, deep)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but TOML also wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if len(value) == 1:
        return f"[{_toml(value[0])}]"
    return "[\n" + "".join(f"    {_toml(item)},\n" for item in value) + "]"
