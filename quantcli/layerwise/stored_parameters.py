"""transformers' parameters out of a checkpoint without a table, by transformers' own map of names.

transformers renames stored tensors, merges experts into stacks and fuses halves as it loads a
model. Its transforms are asked for every stored name; where a parameter is made of whole stored
tensors, one after the other by rows or expert by expert, its rows are found again among the output
tensors, as a table would find them. What is made in any other way is computed by transformers'
transform, and no method sees it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from quantcli.archs.wrappers import plain_name
from quantcli.checkpoint_view import Use, find_uses
from quantcli.errors import ArchitectureError
from quantcli.layerwise.parameters import Parameters
from quantcli.model import Model
from quantcli.plan.linear_layers import natural
from quantcli.types import TensorInfo, row_count


@dataclass(frozen=True, slots=True)
class _Part:
    """``rows`` rows of a stored tensor, from ``start`` on, that a parameter has from ``first``."""

    source: str
    first: int
    rows: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class _Computed:
    """A parameter that a transform makes of stored tensors, by the transform's own patterns."""

    converter: WeightConverter
    sources: Mapping[str, Sequence[str]]


class StoredParameters(Parameters):
    """Reads parameters of ``module``, named and shaped as it holds them, from ``model``."""

    def __init__(self, model: Model, module: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model = model
        self._shapes = shapes
        self._present = {tensor.name: tensor for tensor in model.tensors}
        self._keys, self.feeds, self.turned_columns, self._fed = {}, {}, {}, set()
        self._module = module
        self._parts: dict[str, list[_Part]] = {}
        self._computed: dict[str, _Computed] = {}
        for name, converter, sources in _group(model.store.tensors, module, shapes):
            parts = _find_parts(converter, sources, model.store.tensors)
            if parts is not None and sum(part.rows for part in parts) == row_count(shapes[name]):
                self._parts[name] = parts
            elif converter is not None:
                self._computed[name] = _Computed(converter, sources)
        found = find_uses(model.tensors)
        self._uses = {
            name: [use for part in parts for use in _moved(found.get(part.source, []), name, part)]
            for name, parts in self._parts.items()
        }
        self._whole = {
            name
            for name, uses in self._uses.items()
            if sum(use.piece.stored_rows for use in uses) == row_count(shapes[name])
        }

    def read(self, name: str) -> NDArray[Any]:
        """The parameter's values, float32, or bfloat16/float16 where nothing is lost by it."""
        if name in self._whole:
            return super().read(name)
        shape = self._shapes[name]
        if name in self._computed:
            return self._compute(name).reshape(shape)
        if name not in self._parts:
            raise ArchitectureError(
                f"{self._model.path} has no tensor that becomes transformers' parameter {name}",
                hint="another version of transformers may call it otherwise",
            )
        store = self._model.store
        rows = [store.read_rows(p.source, p.start, p.start + p.rows) for p in self._parts[name]]
        values = rows[0] if len(rows) == 1 else np.concatenate(rows)
        values = values.astype(np.float32) if values.dtype == np.float64 else values
        if values.size != math.prod(shape):
            raise ArchitectureError(
                f"{self._model.path}: what transformers' parameter {name} is made of has "
                f"{values.size:,} weights, and by config.json its shape is {shape}",
                hint="config.json and the weights are of two models, or a setting is missing",
            )
        return values.reshape(shape)

    def lookup(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of a matrix whose rows are stored in order, as `read` gives them."""
        if name in self._whole:
            return super().lookup(name, rows)
        (part,) = self._parts[name]
        read = self._model.store.read_rows
        return np.concatenate([read(part.source, int(row), int(row) + 1) for row in rows])

    def _compute(self, name: str) -> NDArray[Any]:
        made = self._computed[name]
        converter = made.converter.copy(
            made.converter._original_source_patterns.copy(),
            made.converter._original_target_patterns.copy(),
            operations=made.converter.operations,
        )
        for pattern, sources in made.sources.items():
            for source in sources:
                info = self._model.store.tensors[source]
                rows = self._model.store.read_rows(source, 0, row_count(info.shape))
                values = torch.from_numpy(rows.astype(np.float32).reshape(info.shape))
                converter.add_tensor(name, source, pattern, values)
        found = converter.convert(name, model=self._module, config=self._module.config)
        value = found[name]
        result: NDArray[Any] = (value[0] if isinstance(value, list) else value).numpy()
        return result


def _group(
    stored: Mapping[str, TensorInfo], module: Any, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, WeightConverter | None, dict[str, list[str]]]]:
    """Each parameter, the transform that makes it, and stored names by the transform's patterns.

    Without a transform it is one stored tensor under another name.
    """
    transforms = get_model_conversion_mapping(module)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    present = dict(shapes)
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    groups: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)
    for name in sorted(stored, key=natural):
        for spelling in (name, plain_name(name)):
            target, pattern = rename_source_key(
                spelling, renamings, converters, module.base_model_prefix, present
            )
            targets = _targets(target, by_pattern.get(pattern or ""), shapes)
            if targets:
                break
        for each in targets:
            groups[each].setdefault(pattern or "", []).append(name)
    for target, sources in groups.items():
        used = [by_pattern[pattern] for pattern in sources if pattern]
        yield target, used[0] if used else None, sources


def _targets(
    target: str, converter: WeightConverter | None, shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The parameters that a stored tensor goes into: several where a transform takes it apart."""
    if converter is None or len(converter.target_patterns) < 2:
        return [target] if target in shapes else []
    first = converter.target_patterns[0]
    names = [target.replace(first, pattern, 1) for pattern in converter.target_patterns]
    return [name for name in names if name in shapes]


def _find_parts(
    converter: WeightConverter | None,
    sources: Mapping[str, Sequence[str]],
    stored: Mapping[str, TensorInfo],
) -> list[_Part] | None:
    """The rows of stored tensors in a parameter's order, if it is made of whole rows."""
    if converter is None:
        (name,) = next(iter(sources.values()))[:1]
        return [_Part(name, 0, row_count(stored[name].shape))]
    kinds = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    ordered = [sources[p] for p in converter.source_patterns if p in sources]
    if kinds == [(Concatenate, 0)]:
        return _one_after_other([name for names in ordered for name in names], stored)
    if kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        by_expert = zip(*ordered, strict=False)
        return _one_after_other([name for names in by_expert for name in names], stored)
    return None


def _one_after_other(names: Sequence[str], stored: Mapping[str, TensorInfo]) -> list[_Part]:
    parts, first = [], 0
    for name in names:
        rows = row_count(stored[name].shape)
        parts.append(_Part(name, first, rows))
        first += rows
    return parts


def _moved(uses: Sequence[Use], name: str, part: _Part) -> Iterator[Use]:
    """The uses of a stored tensor as those of the parameter that has it from some row on."""
    for use in uses:
        piece = replace(use.piece, source=name, start=use.piece.start + part.first)
        yield Use(use.tensor, piece, use.first)
