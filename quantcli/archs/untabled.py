"""A family without a table: what is quantized is told from the checkpoint's own tensors.

The result has the tables' form: output tensors that are made of stored ones, under GGUF's names as
far as these are known. Only what may be quantized is among them (linear layers, experts, the token
embedding and the head); a model folder copies everything else. No GGUF can be made of it, since
nothing says in which order a runtime wants rows, or which key-values it needs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantcli.archs.config import Config
from quantcli.archs.stored_names import (
    SUFFIX,
    block_name,
    counts_tokens,
    expert_blocks,
    holds_floats,
    in_tower,
    is_embedding,
    is_linear,
    is_per_layer,
    is_router,
    leaf_of,
    main_list,
    numbered_experts,
    place_of,
)
from quantcli.pieces import Order, Piece
from quantcli.types import MetaValue, OutputTensor, TensorInfo, text, u32

_KEYS = {
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    "attention.head_count": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
}
"""What mixtures of types and windows of tokens ask of a model, and keys of config.json."""
_INNER = ("text_config", "llm_config", "language_config", "thinker_config")
_TURNED = re.compile(r"c_(attn|proj|fc)|q_attn")
"""Layers that are stored as (in, out), if the file's ``c_fc`` are."""
_STACKED = {"gate_up_proj": ("gate_proj", "up_proj")}
_STACKS = (*_STACKED, "gate_proj", "up_proj", "down_proj")
_LARGE = 0.01
"""Share of the weights from which a tensor that is kept is worth a word."""


@dataclass(frozen=True)
class Untabled:
    """What the names and shapes of a checkpoint say.

    ``sources`` gives each output tensor's stored name, a pattern over experts ``{e}``;
    ``embeddings`` are the text model's tables that rows are looked up in. ``left`` are large
    tensors that are none of all this, by name, with their share of the weights. ``refused`` is why
    the table of a known family does not take the checkpoint.
    """

    name: str
    tensors: tuple[OutputTensor, ...]
    sources: Mapping[str, str]
    embeddings: frozenset[str]
    left: Mapping[str, float]
    keys: Mapping[str, MetaValue]
    refused: str | None = None

    @property
    def remark(self) -> str:
        """What a user should know of how the layers were found."""
        why = f"there is no table for {self.name}"
        if self.refused is not None:
            why = f"the table for {self.name} does not take this checkpoint ({self.refused})"
        sentence = f"{why}: its linear layers were told from names and shapes of tensors"
        if self.left:
            first = next(iter(self.left))
            more = f" and {len(self.left) - 1} more" if len(self.left) > 1 else ""
            sentence += (
                f"; {first}{more}, {sum(self.left.values()):.0%} of the weights, "
                f"{'are' if more else 'is'} none by name and kept"
            )
        return sentence

    @property
    def apart(self) -> str | None:
        """The module of an expert whose weights lie in one stored tensor with the others'."""
        for tensor in self.tensors:
            first = self.sources[tensor.name].replace("{e}", "0")
            if first != tensor.pieces[0].source:
                return first.removesuffix(SUFFIX)
        return None


def read_untabled(config: Config, stored: Mapping[str, TensorInfo]) -> Untabled:
    """Tell the layers of the model that ``config`` (config.json) names, from its tensors."""
    name = model_name(config)
    text_config = _text_part(config)
    found = _Reader(stored, text_config)
    made = sorted(found.outputs(), key=lambda entry: _llama_order(entry[0]))
    tensors = tuple(tensor for tensor, _ in made)
    used = {piece.source for tensor in tensors for piece in tensor.pieces}
    return Untabled(
        name,
        tensors,
        {tensor.name: source for tensor, source in made},
        found.tables.union(n for n in stored if is_embedding(n) and found.is_main(n)),
        _left({n: info for n, info in stored.items() if not found.is_beside(n)}, used),
        _read_keys(name, text_config, found),
    )


def model_name(config: Config) -> str:
    """The class that config.json names, or its model_type."""
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    return str(config.get("model_type") or "this model")


def _text_part(config: Config) -> dict[str, Any]:
    """config.json with that of the text model above it."""
    merged, inner = dict(config), config
    while nested := next((inner[k] for k in _INNER if isinstance(inner.get(k), Mapping)), None):
        merged, inner = {**merged, **nested}, nested
    return merged


class _Reader:
    """Sorts the stored tensors."""

    def __init__(self, stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
        self.stored = stored
        self.stem = main_list(stored)
        self.mixtures = expert_blocks(stored)
        layers = config.get("num_hidden_layers")
        self.layers = layers if isinstance(layers, int) and layers > 0 else self.blocks
        outside = [
            name
            for name, info in stored.items()
            if len(info.shape) == 2
            and place_of(name).block is None
            and holds_floats(info)
            and not in_tower(name)
        ]
        rows = config.get("vocab_size")
        self.embedding = _embedding(stored, outside, rows if isinstance(rows, int) else 0)
        self.head = self._head(outside)
        self.tables = frozenset([self.embedding] if self.embedding else [])
        table = stored.get(self.embedding or "")
        self.hidden = 0 if table is None else table.shape[1]
        self.vocabulary = 0 if table is None else table.shape[0]

    @property
    def blocks(self) -> int:
        """How many the model's list has."""
        numbers = [
            place.block
            for place in map(place_of, self.stored)
            if place.stem == self.stem and place.block is not None
        ]
        return max(numbers, default=-1) + 1

    def is_beside(self, name: str) -> bool:
        """Whether it is in a block for multi-token prediction, which folders keep as it is."""
        place = place_of(name)
        behind = place.stem == self.stem and (place.block or 0) >= self.layers
        return behind or "mtp" in place.stem

    def is_main(self, name: str) -> bool:
        """Whether it is in the language model itself."""
        return not in_tower(name) and not self.is_beside(name)

    def outputs(self) -> Iterator[tuple[OutputTensor, str]]:
        """Each output tensor and its stored name or pattern."""
        if self.embedding is not None:
            yield self._whole("token_embd.weight", self.embedding)
        if self.head is not None:
            yield self._whole("output.weight", self.head)
        for name, info in self.stored.items():
            if is_per_layer(name) and len(info.shape) == 2 and not in_tower(name):
                yield self._whole("per_layer_token_embd.weight", name)
        linear = [
            name
            for name, info in self.stored.items()
            if is_linear(name, info, self.mixtures) and not self.is_beside(name)
        ]
        stacks = numbered_experts(linear, self.stored)
        apart = {name for members in stacks.values() for name in members}
        entries = {name: [name] for name in linear if name not in apart} | stacks
        halves = [f"{pattern}{SUFFIX}" for pattern, *_ in self._halves()]
        whole = [name for name, _ in (*self._nameless(), *self._columnwise())]
        names = self._unique([*entries, *halves, *whole])
        turned = self._turned(linear)
        for pattern, members in entries.items():
            if len(members) == 1 and "{e}" not in pattern:
                yield self._whole(names[pattern], pattern, turned)
            else:
                rows, columns = self.stored[members[0]].shape
                pieces = tuple(Piece(member, rows) for member in members)
                shape = (len(members), rows, columns)
                dtype = self.stored[members[0]].dtype
                yield OutputTensor(names[pattern], shape, dtype, pieces), pattern
        for pattern, info, index, of in self._halves():
            experts, rows = info.shape[0], info.shape[1] // of
            pieces = tuple(
                Piece(info.name, rows, start=(e * of + index) * rows) for e in range(experts)
            )
            shape = (experts, rows, info.shape[2])
            pattern += SUFFIX
            yield OutputTensor(names[pattern], shape, info.dtype, pieces), pattern

        for name, info in self._nameless():
            experts, rows, columns = info.shape
            pieces = tuple(Piece(name, rows, start=e * rows) for e in range(experts))
            yield OutputTensor(names[name], info.shape, info.dtype, pieces), name
        for name, info in self._columnwise():
            experts, columns, rows = info.shape
            order = Order((columns, rows), (1, 0), rows)
            pieces = tuple(Piece(name, rows, e * columns, order) for e in range(experts))
            yield OutputTensor(names[name], (experts, rows, columns), info.dtype, pieces), name

    def _nameless(self) -> Iterator[tuple[str, TensorInfo]]:
        """Stacks of experts for whose parts no layout has a name."""
        for name, info in self.stored.items():
            outward = leaf_of(name) == "output_linear"
            if not outward and leaf_of(name) != "input_linear":
                continue
            whole = len(info.shape) == 3 and holds_floats(info) and place_of(name).block is not None
            if whole and not in_tower(name) and info.shape[1 if outward else 2] == self.hidden:
                yield name, info

    def _whole(self, name: str, source: str, turned: bool = False) -> tuple[OutputTensor, str]:
        info = self.stored[source]
        shape, order = info.shape, None
        if turned and _TURNED.fullmatch(leaf_of(source)):
            shape, order = shape[::-1], Order(shape, (1, 0), shape[-1])
        piece = Piece(source, shape[0], order=order)
        return OutputTensor(name, shape, info.dtype, (piece,)), source

    def _head(self, outside: list[str]) -> str | None:
        """The matrix with a row for each token that is no embedding."""
        if self.embedding is None:
            return None
        tokens = self.stored[self.embedding].shape[0]
        heads = [
            name
            for name in outside
            if name != self.embedding
            and self.stored[name].shape[0] == tokens
            and not is_embedding(name)
            and name.endswith(SUFFIX)
        ]
        named = [name for name in heads if leaf_of(name) == "lm_head"]
        return next(iter(named or heads), None)

    def _halves(self) -> Iterator[tuple[str, TensorInfo, int, int]]:
        """The parts of stacked experts: pattern, stored tensor, which part, of how many."""
        for parent, leaf, info in self._stacks():
            if self._by_rows(parent) == {True}:
                parts = _STACKED.get(leaf, (leaf,))
                for index, part in enumerate(parts):
                    yield f"{parent}.{{e}}.{part}", info, index, len(parts)

    def _columnwise(self) -> Iterator[tuple[str, TensorInfo]]:
        """Stacked experts that are stored as (in, out): nobody reads their parts by themselves."""
        for parent, _, info in self._stacks():
            if self._by_rows(parent) == {False}:
                yield info.name, info

    def _stacks(self) -> Iterator[tuple[str, str, TensorInfo]]:
        """Stacked experts: their module, what they are called there, and the stored tensor."""
        for name, info in self.stored.items():
            leaf, parent = leaf_of(name), name.removesuffix(SUFFIX).rpartition(".")[0]
            if len(info.shape) != 3 or leaf not in _STACKS or "expert" not in parent:
                continue
            if in_tower(name) or place_of(name).block is None or self.is_beside(name):
                continue
            if holds_floats(info):
                yield parent, leaf, info

    def _by_rows(self, parent: str) -> set[bool]:
        """Whether the stacks of a module hold (out, in) rather than (in, out) matrices.

        Empty where their shapes do not tell, both where they disagree.
        """
        votes = set()
        for leaf in _STACKS:
            info = self.stored.get(f"{parent}.{leaf}") or self.stored.get(f"{parent}.{leaf}.weight")
            if info is not None and info.shape[1] != info.shape[2]:
                inner = info.shape[1] if leaf == "down_proj" else info.shape[2]
                votes.add(inner == self.hidden)
        return votes

    def _turned(self, linear: list[str]) -> bool:
        """Whether the layers are stored as (in, out), as GPT-2's are: its MLPs show it."""
        shapes = {self.stored[name].shape for name in linear if leaf_of(name) == "c_fc"}
        return any(rows == self.hidden != columns for rows, columns in shapes)

    def _unique(self, patterns: list[str]) -> dict[str, str]:
        """Output names by pattern; where two would have one name, both keep their own."""
        found = {pattern: self._named(pattern, known=True) for pattern in patterns}
        times = Counter(found.values())
        return {
            pattern: name if times[name] == 1 else self._named(pattern, known=False)
            for pattern, name in found.items()
        }

    def _named(self, pattern: str, *, known: bool) -> str:
        place = place_of(pattern)
        if place.block is None or place.stem != self.stem:
            return pattern.replace(".{e}", "")
        rest = place.rest.removesuffix(SUFFIX).replace(".{e}", "")
        return block_name(place.block, rest) if known else f"blk.{place.block}.{rest}{SUFFIX}"


def _embedding(stored: Mapping[str, TensorInfo], outside: list[str], rows: int) -> str | None:
    """The token embedding: the table with a row for each token, or the longest one."""
    tables = [name for name in outside if counts_tokens(name) and not is_per_layer(name)]
    if not tables:
        tables = [n for n in outside if stored[n].shape[0] == rows and leaf_of(n) != "lm_head"]
    whole = [name for name in tables if stored[name].shape[0] == rows]
    return max(whole or tables, key=lambda name: stored[name].shape[0], default=None)


def _left(stored: Mapping[str, TensorInfo], used: set[str]) -> dict[str, float]:
    """Large tensors of the language model that are neither quantized nor looked up in."""
    mixtures = expert_blocks(stored)
    total = sum(info.elements for info in stored.values() if holds_floats(info))
    return {
        name: info.elements / total
        for name, info in stored.items()
        if name not in used
        and holds_floats(info)
        and len(info.shape) > 1
        and info.elements >= _LARGE * total
        and not in_tower(name)
        and not is_embedding(name)
        and not is_router(name, info, mixtures)
    }


def _read_keys(name: str, config: Mapping[str, Any], found: _Reader) -> dict[str, MetaValue]:
    keys = {
        "general.architecture": text(name),
        f"{name}.block_count": u32(found.blocks),
        f"{name}.vocab_size": u32(found.vocabulary),
    }
    for key, spellings in _KEYS.items():
        if key == "expert_count" and not found.mixtures:
            continue  # config.json may hold the class's default
        value = next((config[each] for each in spellings if config.get(each) is not None), None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            keys[f"{name}.{key}"] = u32(value)
    return keys


def _llama_order(tensor: OutputTensor) -> tuple[int, str]:
    """Outside the blocks first, then by block, then by name, as the tables' tensors come."""
    block = re.match(r"blk\.(\d+)\.", tensor.name)
    return (int(block[1]) if block else -1, tensor.name)
