"""A recipe as a file: strict TOML or YAML in, TOML out.

What `dump_recipe` writes, `load_recipe` reads back as an equal recipe; it is also what an output
file records. A file may hold several outputs (``[[outputs]]``, or lists of types, bits or layouts):
`load_outputs` reads them, each with what stands above them all. Unknown fields, duplicate keys and
values of the wrong type are refused with the file and the field named.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from quantcli.bounded_yaml import MOST_CHARACTERS, load_yaml
from quantcli.errors import QuantcliError, UsageError
from quantcli.plan.output_set import SEVERAL, Output, combine, split_values
from quantcli.plan.recipe import Recipe, given_fields, make_recipe, refuse_unknown
from quantcli.plan.recipe_check import check_recipe
from quantcli.plan.recorded_recipe import recorded_recipe
from quantcli.plan.schemes import has_types
from quantcli.plan.shipped_recipes import find_recipe
from quantcli.whole_files import read_whole_text

OUTPUTS, NAME = "outputs", "name"
"""The list of outputs in a recipe file, and what one of them is called."""


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a .toml, .yaml or .yml file or in an output, or one that comes with quantcli.

    UsageError names the file and the field.
    """
    outputs = load_outputs(path)
    if len(outputs) > 1:
        raise UsageError(f"recipe {path} holds {len(outputs)} outputs, and one is asked for")
    return outputs[0].recipe


def load_outputs(path: str | Path) -> tuple[Output, ...]:
    """The outputs that a file holds, one or several, or the one that it is itself.

    UsageError as for `load_recipe`.
    """
    path = find_recipe(Path(path))
    recorded_text = recorded_recipe(path)
    if recorded_text is not None:
        return _read_outputs(path, recorded_text, ".toml")
    try:
        content = read_whole_text(path, MOST_CHARACTERS)
    except OSError as error:
        raise UsageError(f"recipe {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {path}: not UTF-8 at byte {error.start}") from None
    return _read_outputs(path, content, path.suffix.lower())


def _read_outputs(path: Path, content: str, suffix: str) -> tuple[Output, ...]:
    try:
        return tuple(_outputs(_parse(content, suffix)))
    except QuantcliError as error:
        raise UsageError(f"recipe {path}: {error.message}", hint=error.hint) from None


def read_bases(path: str | Path | None) -> tuple[Output, ...]:
    """The outputs of a recipe file, or without one a single output by default."""
    return (Output(Recipe()),) if path is None else load_outputs(path)


def _outputs(fields: dict[str, Any]) -> Iterator[Output]:
    listed = fields.pop(OUTPUTS, [{}])
    if not listed or not isinstance(listed, list) or not all(isinstance(o, dict) for o in listed):
        raise UsageError(f"{OUTPUTS} is no list of tables", hint="[[outputs]] begins each of them")
    for own in listed:
        merged = {**fields, **own}
        name = merged.pop(NAME, None) if own else None
        if name is not None and (not isinstance(name, str) or not _is_file_name(name)):
            raise UsageError(f"{NAME} {name!r} is no file name", hint="-o names the folder")
        refuse_unknown(merged)
        for each in _each(merged):
            recipe = make_recipe(each)
            check_recipe(recipe)
            yield Output(recipe, name=name)


def _is_file_name(name: str) -> bool:
    return name == Path(name).name and name not in ("", "..") and name.isprintable()


def _each(fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The fields as they are, or for each value of those that list several."""
    lists = {name: fields.get(name) for name in SEVERAL}
    if not any(isinstance(given, list) for given in lists.values()):
        yield dict(fields)
        return
    rest = {name: value for name, value in fields.items() if name not in SEVERAL}
    for chosen in combine({name: split_values(name, given) for name, given in lists.items()}):
        yield rest | chosen


def dump_outputs(outputs: Sequence[Output]) -> str:
    """The recipe, or a list of all; `load_outputs` reads the same recipes from it."""
    if len(outputs) == 1:
        return dump_recipe(outputs[0].recipe)
    parts = []
    for output in outputs:
        name = "" if output.name is None else f"{NAME} = {_toml(output.name)}\n"
        parts.append(f"[[{OUTPUTS}]]\n{name}{dump_recipe(output.recipe)}")
    return "\n".join(parts)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML: its type, then what differs from the defaults, in the fields' order.

    A model folder with an integer grid has no type, so its format comes first.
    """
    fields: dict[str, Any] = {"type": recipe.type} if has_types(recipe.to) else {"to": recipe.to}
    fields |= {field.name: value for field, value in given_fields(recipe)}
    return "".join(f"{name} = {_toml(value)}\n" for name, value in fields.items())


def recorded(recipe: Recipe) -> Recipe:
    """The recipe as an output holds it: of files their names alone, wherever they lie here."""
    imatrix, template, statistics = (
        None if path is None else Path(path).name
        for path in (recipe.imatrix, recipe.chat_template, recipe.statistics)
    )
    return replace(recipe, imatrix=imatrix, chat_template=template, statistics=statistics)


def _parse(content: str, suffix: str) -> dict[str, Any]:
    if suffix == ".toml":
        try:
            return tomllib.loads(content)
        except ValueError as error:
            raise UsageError(f"not TOML: {error}") from None
        except RecursionError:
            raise UsageError("nested too deeply") from None
    if suffix not in (".yaml", ".yml"):
        raise UsageError(
            f"expected a .toml, .yaml or .yml file, found {suffix or 'no suffix'}"
        ) from None
    try:
        fields = load_yaml(content, _StrictLoader)
    except ValueError as error:
        raise UsageError(f"not YAML: {error}") from None
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise UsageError(f"expected a table of fields, found {type(fields).__name__}")
    return fields


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which would take the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key in (self.construct_object(key) for key, _ in node.value):
            # A list as a key is refused in a moment, with its place.
            if isinstance(key, Hashable):
                if key in seen:
                    raise UsageError(f"field {key} is given twice")
                seen.add(key)
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
