"""An output of which types or schemes are chosen: the choices, the size they must keep to, and
what becomes of it when they are made."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

from quantcli.artifacts.gguf_file import GgufFile, prepare_gguf
from quantcli.artifacts.largest_weights import largest_weight
from quantcli.artifacts.model_folder import ModelFolder, prepare_folder
from quantcli.formats import get_format
from quantcli.model import Model
from quantcli.plan.allocate import Choice
from quantcli.plan.patterns import parse_format
from quantcli.plan.recipe import KEPT, Recipe, list_wanted, merge_recipe
from quantcli.plan.scheme_choices import SchemeChoices, find_scheme_choices
from quantcli.plan.schemes import Scheme, knows_importance
from quantcli.plan.size_text import parse_size
from quantcli.plan.type_choices import find_type_choices, usual_types
from quantcli.rounding.codecs import BlockCodec, GridCodec, WeightCodec
from quantcli.run.bias_means import take_means
from quantcli.sources.imatrix import Importance

Candidates = dict[str, dict[str, WeightCodec]]
"""By tensor and the candidate's name: how it stores the weights."""


class Target(Protocol):
    """What an allocation needs to know of an output."""

    noun: str
    """What is chosen: "type" or "scheme"."""

    @property
    def label(self) -> str:
        """What the output is without a choice."""

    @property
    def recipe(self) -> Recipe:
        """The output's, as it was asked for."""

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All that there is to choose."""

    @property
    def candidates(self) -> Candidates:
        """What costs are needed of."""

    @property
    def limit(self) -> int:
        """Bytes of `size` that are allowed."""

    def size(self, artifact: GgufFile | ModelFolder) -> int:
        """What counts of an output's bytes."""

    def rebuild(self, kinds: dict[str, str]) -> GgufFile | ModelFolder:
        """The output with these kinds; with none its own."""


def _settled(recipe: Recipe) -> Recipe:
    """The recipe of an output whose kinds are chosen."""
    return replace(recipe, allocate=False, target_size=None, target_bpw=None, allocate_from=None)


@dataclass(frozen=True)
class GgufTarget:
    """A GGUF, whose tensors get types."""

    model: Model
    artifact: GgufFile
    output: Path
    importance: Importance | None
    check: bool = True

    noun = "type"

    @property
    def label(self) -> str:
        """The type."""
        return self.artifact.plan.label

    @property
    def recipe(self) -> Recipe:
        """The plan's."""
        return self.artifact.plan.recipe

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Every tensor whose type is not asked for by name."""
        plan, padded = self.artifact.plan, self.recipe.target_bpw is None
        types = tuple(parse_format(name) for name in list_wanted(self.recipe)) or usual_types(plan)
        return tuple(find_type_choices(plan, types, padded=padded))

    @property
    def candidates(self) -> Candidates:
        """The types of each."""
        return {
            choice.name: {kind: BlockCodec(get_format(kind)) for kind in choice.sizes}
            for choice in self.choices
        }

    @property
    def limit(self) -> int:
        """Of the file, or of the tensors for a number of bits."""
        if self.recipe.target_bpw is not None:
            return int(self.recipe.target_bpw * self.artifact.plan.elements / 8)
        return parse_size(self.recipe.target_size or str(self.artifact.nbytes))

    def size(self, artifact: GgufFile | ModelFolder) -> int:
        """Likewise."""
        if self.recipe.target_bpw is not None and isinstance(artifact, GgufFile):
            return sum(item.nbytes for item in artifact.plan.items)
        return artifact.nbytes

    def rebuild(self, kinds: dict[str, str]) -> GgufFile:
        """Types by name, in the recipe that the file records."""
        types = [f"^{re.escape(name)}$={kind}" for name, kind in sorted(kinds.items())]
        recipe = _settled(merge_recipe(self.recipe, tensor_types=types))
        artifact = prepare_gguf(
            self.model, recipe, self.output, importance=self.importance,
            force=self.artifact.force, check=self.check,
        )  # fmt: skip
        return take_means(artifact)


@dataclass(frozen=True)
class FolderTarget:
    """A model folder, whose modules get schemes."""

    model: Model
    artifact: ModelFolder
    output: Path
    importance: Importance | None
    check: bool = True

    noun = "scheme"

    @property
    def label(self) -> str:
        """The scheme, or several."""
        return self.artifact.plan.label

    @property
    def recipe(self) -> Recipe:
        """The plan's."""
        return self.artifact.plan.recipe

    @cached_property
    def _found(self) -> SchemeChoices:
        return find_scheme_choices(
            self.model, self.artifact.plan, list_wanted(self.recipe),
            has_importance=knows_importance(self.recipe),
        )  # fmt: skip

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Every group of modules whose scheme is not asked for by a pattern."""
        return self._found.choices

    @property
    def candidates(self) -> Candidates:
        """The schemes of each tensor of GGUF that holds a module's weights."""
        schemes = self._found.schemes
        return {
            tensor: {
                kind: _codec(self.model, tensor, schemes[kind])
                for kind in choice.sizes
                if kind != KEPT
            }
            for choice in self.choices
            for tensor in choice.tensors
        }

    @property
    def limit(self) -> int:
        """Of the folder for a size; else of the tensors."""
        if self.recipe.target_size is not None:
            return parse_size(self.recipe.target_size)
        if self.recipe.target_bpw is not None:
            return int(self.recipe.target_bpw * self.artifact.plan.elements / 8)
        return self.artifact.weights.tensor_bytes

    def size(self, artifact: GgufFile | ModelFolder) -> int:
        """Likewise."""
        if self.recipe.target_size is None and isinstance(artifact, ModelFolder):
            return artifact.weights.tensor_bytes
        return artifact.nbytes

    def rebuild(self, kinds: dict[str, str]) -> ModelFolder:
        """Schemes by patterns, in the recipe that the folder records."""
        recipe = _settled(self.recipe)
        if kinds:
            asked = [entry for entry in recipe.scheme if "=" in entry]
            recipe = replace(
                recipe, scheme=(*asked, *self._found.entries(kinds)), bits=None, group_size=None,
                symmetric=None, activations=None,
            )  # fmt: skip
        folder = prepare_folder(
            self.model, recipe, self.output,
            importance=self.importance if knows_importance(recipe) else None,
            force=self.artifact.force, check=self.check,
        )  # fmt: skip
        return replace(folder, scales=self.artifact.scales)


def _codec(model: Model, tensor: str, scheme: Scheme) -> GridCodec:
    return GridCodec(scheme.grid, scheme.label, partial(largest_weight, model, tensor))


def find_target(
    model: Model, artifact: GgufFile | ModelFolder, output: Path, importance: Importance | None, *,
    check: bool = True,
) -> GgufTarget | FolderTarget:  # fmt: skip
    """The target of an output; ``check=False`` for a dry run."""
    if isinstance(artifact, GgufFile):
        return GgufTarget(model, artifact, output, importance, check)
    return FolderTarget(model, artifact, output, importance, check)
