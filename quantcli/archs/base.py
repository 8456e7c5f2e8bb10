"""What an architecture is: tables from stored tensors to GGUF's, and from config.json to keys.

A family's file holds the tables and what it must refuse; the walking is done once for all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantcli.archs.assemble import LayerDims, assemble, rename, stored_shapes
from quantcli.archs.config import Config, check_fixed, class_name, settle
from quantcli.archs.fold import Folds
from quantcli.archs.header import Header
from quantcli.archs.mtp import Mtp, add_blocks
from quantcli.archs.rope import rope_notes
from quantcli.archs.rules import Dims, Feed, KeyRule, Rule, Values, at
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, OutputTensor, TensorInfo, TensorStore, array

_UNPREFIXED = (r"^(?=(embed_tokens|layers|norm|embedding_norm|final_layernorm)\.)", "model.")

_TRAINING = (r"v_head\..*",)
"""Tensors that only training needs: TRL's estimate of a text's value."""

LIMITS = {"layers": 512, "experts": 1024}
"""LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS of llama.cpp; it aborts above them."""


def _no_values(config: Config, dims: Dims) -> Values:
    return {}


def _no_layer_dims(config: Config, layer: int) -> Dims:
    return {}


def no_check(config: Config, dims: Dims) -> None:
    """Nothing to refuse."""


def _no_notes(config: Config) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family of models that llama.cpp runs under one ``general.architecture``.

    Callables receive the settled configuration (text part, with ``defaults`` filled in).
    """

    name: str
    """GGUF's general.architecture."""
    read_dims: Callable[[Config], dict[str, int]]
    read_rules: Callable[[Config], tuple[Rule, ...]]
    to_keys: Callable[[Config, Dims], dict[str, MetaValue]]
    """Key-values without their "{name}." prefix, which "tokenizer.*" do not have."""
    to_config: Callable[[Header], dict[str, Any]]
    """The way back: keys of config.json, "architectures" and "model_type" among them, for every
    class with this ``name``; `rebuild_config` adds the vocabulary's."""
    keyed: tuple[KeyRule, ...] = ()
    """Key-values that checkpoints store as tensors."""
    read_layer_dims: Callable[[Config, int], Dims] = _no_layer_dims
    """Sizes that only this layer has."""
    read_values: Callable[[Config, Dims], Values] = _no_values
    """Float32 tensors computed from the configuration alone."""
    check: Callable[[Config, Dims], None] = no_check
    """Refuses what llama.cpp would compute differently."""
    read_notes: Callable[[Config], tuple[str, ...]] = _no_notes
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """transformers' defaults of keys that published config.json files leave out."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys of which llama.cpp supports these values only; the first is its assumption."""
    renames: tuple[tuple[str, str], ...] = ()
    """Patterns and replacements that bring other spellings of stored names to the rules'."""
    ignored: tuple[str, ...] = ()
    """Patterns (full match) of stored tensors that are rightly left out."""
    folds: Folds = field(default_factory=Folds)
    """Which tensors meet at which channels."""
    tied: bool = False
    """Whether the output matrix is the embeddings', whatever config.json says."""
    loads_packed: bool = True
    """Whether transformers' class takes layers whose weights are packed integers."""
    published: tuple[tuple[str, str], ...] = ()
    """Patterns and replacements from the rules' spelling to the names that transformers saves."""
    mtp: Mtp | None = None
    """Blocks behind the last layer that predict further tokens."""
    others: tuple[tuple[Callable[[Config], bool], Architecture], ...] = ()
    """What the same class is called in GGUF for some configurations, and for which."""

    def variant(self, config: Config) -> Architecture:
        """The one of `others` that ``config`` belongs to, or this."""
        settled = settle(config, self.defaults)
        return next((other for fits, other in self.others if fits(settled)), self)

    def tensors(self, config: Config, stored: Mapping[str, TensorInfo]) -> list[OutputTensor]:
        """Every GGUF tensor, in llama.cpp's order: outside the layers first, then by layer.

        Raises ArchitectureError for a stored tensor that is unknown, missing or misshapen.
        """
        settled, dims = self._settle(config, stored)
        return assemble(
            class_name(settled),
            self._rules(settled, dims),
            self._layer_dims(settled, dims),
            self.read_values(settled, dims),
            stored,
            keyed=self.keyed,
            renames=self._renames(self.read_rules(settled)),
            ignored=(*self.ignored, *_TRAINING),
        )

    def stored(self, config: Config, written: Container[str]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a checkpoint's tensors, of which the GGUF ``written`` is made.

        The other way of `tensors`, which takes what is named here back to GGUF's tensors.
        """
        settled, dims = self._settle(config)
        if self.mtp is not None:
            dims["mtp"] = self.mtp.written(settled, dims["layers"], written)
        layered = self._layer_dims(settled, dims)
        found = stored_shapes(self._rules(settled, dims), layered, self.keyed, written)
        for pattern, replacement in self.published:
            found = {re.sub(pattern, replacement, name): shape for name, shape in found.items()}
        return found

    def sources(
        self, config: Config, stored: Mapping[str, TensorInfo] | None = None
    ) -> dict[str, str]:
        """GGUF name -> stored name, the latter a pattern over experts ``{e}``.

        Blocks behind the last layer are those that are ``stored``, or that config.json names.
        """
        settled, dims = self._settle(config, stored)
        return {
            at(rule.name, layer): at(rule.source, layer)
            for rule in self._rules(settled, dims)
            for layer in rule.places(dims["layers"])
        }

    def feeds(self, config: Config, stored: Mapping[str, TensorInfo]) -> dict[str, list[Feed]]:
        """Where outputs of ``stored`` matrices, by their names, are inputs of GGUF tensors."""
        settled, dims = self._settle(config, stored)
        layered, rules = self._layer_dims(settled, dims), self._rules(settled, dims)
        spelled = rename(self._renames(rules), stored)
        found: dict[str, list[Feed]] = {}
        for rule, outputs in ((rule, rule.fed_by) for rule in rules):
            if outputs is None:
                continue
            for layer in rule.places(dims["layers"]):
                name = spelled[at(outputs.source, layer)].name
                feed = outputs.feed(at(rule.name, layer), layered(layer))
                found.setdefault(name, []).append(feed)
        return found

    def metadata(
        self,
        config: Config,
        store: TensorStore | None = None,
        stored: Mapping[str, TensorInfo] | None = None,
    ) -> dict[str, MetaValue]:
        """Every ``{arch}.*`` key-value, those that are stored as tensors only with their ``store``.

        Blocks behind the last layer are those among the ``stored`` tensors (of the ``store`` if
        there is one), or without them those that config.json names. Raises ArchitectureError for a
        missing or wrong key, or tensor.
        """
        settled, dims = self._settle(config, store.tensors if store is not None else stored)
        keys = add_blocks(self.to_keys(settled, dims), dims["layers"], dims["mtp"])
        found = {self._whole(key): v for key, v in keys.items()}
        if store is not None and self.keyed:
            self.tensors(config, store.tensors)
            for name, (key, layer) in self.key_places(config, store.tensors).items():
                numbers = found.setdefault(key, array("f32", [0.0] * dims["layers"])).value
                numbers[layer] = float(store.read_rows(name, 0, 1)[0, 0])
        return found

    def is_tied(self, config: Config) -> bool:
        """Whether the output matrix is the embeddings' by the configuration."""
        return self._settle(config)[0].get("tie_word_embeddings") is True

    def key_places(
        self, config: Config, stored: Mapping[str, TensorInfo]
    ) -> dict[str, tuple[str, int]]:
        """The key-value, and the number in it, that holds the value of some ``stored`` tensors."""
        settled, dims = self._settle(config)
        places = {
            at(rule.source, layer): (rule.key.replace("{arch}", self.name), layer)
            for rule in self.keyed
            for layer in range(dims["layers"])
        }
        renames = self._renames(self.read_rules(settled))
        names = rename(renames, stored).items() if self.keyed else ()
        return {info.name: places[name] for name, info in names if name in places}

    def notes(
        self, config: Config, stored: Mapping[str, TensorInfo] | None = None
    ) -> tuple[str, ...]:
        """Sentences on what llama.cpp computes otherwise than transformers, and from when.

        With the ``stored`` tensors also on blocks behind the last layer that are not among them.
        """
        settled, dims = self._settle(config, stored)
        notes = (*self.read_notes(settled), *rope_notes(settled))
        if any(name.startswith("v_head.") for name in stored or ()):
            notes += ("v_head, which TRL trains models with, is left out",)
        if self.mtp is None or stored is None or not self.mtp.declared(settled) > dims["mtp"]:
            return notes
        return (
            *notes,
            f"config.json sets {self.mtp.key} to {self.mtp.declared(settled)}, but of these blocks "
            f"for multi-token prediction the checkpoint holds {dims['mtp'] or 'none'}, and so does "
            "what is made of it",
        )

    def _rules(self, settled: Config, dims: Dims) -> tuple[Rule, ...]:
        """The family's, and those of the blocks behind the last layer."""
        rules = self.read_rules(settled)
        if self.mtp is None or not dims["mtp"]:
            return rules
        blocks = range(dims["layers"], dims["layers"] + dims["mtp"])
        return (*rules, *self.mtp.read_rules(settled, blocks))

    def _whole(self, key: str) -> str:
        return key if key.startswith("tokenizer.") else f"{self.name}.{key}"

    def _renames(self, rules: tuple[Rule, ...]) -> tuple[tuple[str, str], ...]:
        """The family's, and the prefix that a decoder saved without its model lacks."""
        prefixed = any(rule.source.startswith("model.layers.") for rule in rules)
        return (*self.renames, *([_UNPREFIXED] if prefixed else []))

    def _layer_dims(self, settled: Config, dims: Dims) -> LayerDims:
        def read(layer: int | None) -> Dims:
            return dims if layer is None else {**dims, **self.read_layer_dims(settled, layer)}

        return read

    def _settle(
        self, config: Config, stored: Mapping[str, TensorInfo] | None = None
    ) -> tuple[dict[str, Any], dict[str, int]]:
        """The settled configuration and sizes, "mtp" being how many blocks follow the layers.

        Those that are ``stored``, or without it those that config.json names.
        """
        settled = settle(config, self.defaults)
        if self.tied:
            settled["tie_word_embeddings"] = True
        check_fixed(settled, self.fixed)
        dims = {**self.read_dims(settled), "mtp": 0}
        if self.mtp is not None and stored is not None:
            names = rename(self._renames(self.read_rules(settled)), stored)
            dims["mtp"] = self.mtp.held(dims["layers"], names)
        elif self.mtp is not None:
            dims["mtp"] = self.mtp.declared(settled)
        for size, most in LIMITS.items():
            if dims.get(size, 0) > most:
                raise ArchitectureError(
                    f"config.json of {class_name(settled)} has {dims[size]} {size}, "
                    f"but llama.cpp takes at most {most}"
                )
        self.check(settled, dims)
        return settled, dims
