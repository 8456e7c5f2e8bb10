"""A recipe: everything that decides a quantized file besides the model, as data.

The fields are llama.cpp's options under their own names. A strict TOML or YAML file holds any of
them, flags win over the file. What `dump_recipe` writes, `load_recipe` reads back as an equal
recipe; equal recipes give the same text, which is what an output file records. Unknown fields,
duplicate keys and values of the wrong type are refused with the file and the field named. Paths are
relative to the current folder, as on the command line, so a printed recipe means the same wherever
it is saved.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from quantcli.errors import QuantcliError, UsageError
from quantcli.plan.budget import parse_size
from quantcli.plan.filetypes import find_file_type
from quantcli.plan.override import split_override
from quantcli.plan.patterns import parse_format, parse_tensor_type
from quantcli.plan.schemes import check_scheme, has_types
from quantcli.registry import near


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to make; all but the type default to what llama-quantize does."""

    type: str = "Q4_K_M"
    """File type."""
    tensor_types: tuple[str, ...] = ()
    """REGEX=TYPE, block formats by tensor name; the first that is found in a name wins."""
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    leave_output_tensor: bool = False
    pure: bool = False
    imatrix: str | None = None
    """Path of an importance matrix."""
    include_weights: tuple[str, ...] = ()
    """Parts of names: only matching entries of the importance matrix are used."""
    exclude_weights: tuple[str, ...] = ()
    """Parts of names: matching entries of the importance matrix are not used."""
    allow_requantize: bool = False
    override_kv: tuple[str, ...] = ()
    """KEY=TYPE:VALUE."""
    on_fallback: Literal["warn", "error"] = "warn"
    """What to do when a format's blocks do not divide a tensor's rows."""
    split_max_size: str | None = None
    """Largest shard, such as 2G; decimal units."""
    pre: str | None = None
    """Name of the pre-tokenizer, instead of recognising it."""
    to: str = "gguf"
    """Output format: a GGUF, or a model folder for another runtime."""
    bits: int | None = None
    """Of the integer grid of a model folder; 4, or 8 with int8 activations."""
    group_size: int | str | None = None
    """Weights that share a scale, or "channel" for a row, "tensor" for all."""
    symmetric: bool | None = None
    activations: str | None = None
    """int8: activations are quantized too, token by token, when the model runs."""
    range: str | None = None
    """How each group's range is found: minmax, mse or imatrix."""
    keep: tuple[str, ...] = ()
    """In a GGUF PLACES=TYPE, places being first, last, head, embeddings; in a model folder parts
    (REGEX) of names of linear modules that are not quantized."""
    dtype: str | None = None
    """BF16, F16 or F32 for what a model folder does not quantize; the stored one otherwise."""
    method: str | None = None
    """Calibrated methods, such as gptq; several with commas between them."""
    damping: float | None = None
    """Of a Hessian's diagonal, as a share of its mean."""
    column_order: Literal["natural", "activation"] | None = None
    """In which order error feedback takes the columns."""
    sweeps: int | None = None
    """Of coordinate descent after error feedback."""
    fisher_windows: int | None = None
    """How many windows tell, going backwards, what outputs matter."""
    random_share: float | None = None
    """Of the windows that a method is fitted to, how many are of random tokens."""
    propagate: bool = False
    """Whether a layer's inputs come from the quantized layers before it."""
    tune_steps: int | None = None
    allocate: bool = False
    """Whether types are chosen by what they cost, within the size that ``type`` gives."""
    target_size: str | None = None
    """Another size to choose them within."""
    """Of training each layer."""
    tune: Literal["e2e"] | None = None
    """Training of the whole model, after all tensors were rounded."""
    e2e_steps: int | None = None
    """Of that training."""


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a .toml, .yaml or .yml file; UsageError that names the file and the field."""
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"recipe {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {path}: not UTF-8 at byte {error.start}") from None
    try:
        fields = _parse(content, path.suffix.lower())
        _refuse_unknown(fields)
        recipe = _convert(fields)
        check_recipe(recipe)
    except QuantcliError as error:
        raise UsageError(f"recipe {path}: {error.message}", hint=error.hint) from None
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML: its type, then what differs from the defaults, in the fields' order.

    A model folder with an integer grid has no type, but its format first.
    """
    fields = {"type": recipe.type} if has_types(recipe.to) else {"to": recipe.to}
    fields |= msgspec.to_builtins(recipe)
    return "".join(f"{name} = {_toml(value)}\n" for name, value in fields.items())


def merge_recipe(base: Recipe, **flags: Any) -> Recipe:
    """``base`` with the given fields replaced; None or an empty list means: not given.

    Of the lists, tensor_types are put before the recipe's, so that they win; an override_kv
    replaces the recipe's for the same key; include_weights or exclude_weights replace both lists of
    the recipe. Raises UsageError for a name that is no field.
    """
    _refuse_unknown(flags)
    given = {name: value for name, value in flags.items() if value not in (None, (), [])}
    if "tensor_types" in given:
        given["tensor_types"] = (*given["tensor_types"], *base.tensor_types)
    if "override_kv" in given:
        keys = {split_override(entry)[0] for entry in given["override_kv"]}
        kept = (entry for entry in base.override_kv if split_override(entry)[0] not in keys)
        given["override_kv"] = (*kept, *given["override_kv"])
    if "include_weights" in given or "exclude_weights" in given:
        given = {"include_weights": (), "exclude_weights": ()} | given
    return _convert(msgspec.structs.asdict(base) | given)


def check_recipe(recipe: Recipe) -> None:
    """Refuse whatever is wrong whatever the model; UsageError."""
    check_scheme(recipe, msgspec.to_builtins(recipe))
    find_file_type(recipe.type)
    for entry in recipe.tensor_types:
        parse_tensor_type(entry)
    for name in (recipe.output_tensor_type, recipe.token_embedding_type):
        if name is not None:
            parse_format(name)
    for entry in recipe.override_kv:
        split_override(entry)
    if recipe.include_weights and recipe.exclude_weights:
        raise UsageError("include_weights and exclude_weights cannot be used together")
    if recipe.split_max_size is not None:
        parse_size(recipe.split_max_size)
    if recipe.target_size is not None:
        parse_size(recipe.target_size)


def _refuse_unknown(names: Iterable[Any]) -> None:
    """UsageError, with the nearest field, for the first name that is no field of a recipe."""
    fields = [field.name for field in msgspec.structs.fields(Recipe)]
    for name in names:
        if name not in fields:
            guess = near(str(name).replace("-", "_"), fields, most=1)
            hint = f"did you mean {guess[0]}?" if guess else "known: " + ", ".join(fields)
            raise UsageError(f"a recipe has no field {name}", hint=hint)


def _convert(fields: Any) -> Recipe:
    """A recipe from plain data; UsageError that names the field when a type does not fit."""
    try:
        return msgspec.convert(fields, Recipe)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        field = where.strip("`.") or "recipe"
        raise UsageError(f"{field}: {what[:1].lower()}{what[1:]}") from None


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
