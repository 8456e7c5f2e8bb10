"""MLX's stacks of experts as the single matrices that checkpoints have.

``mlx_lm`` puts the experts of a layer into ``X.switch_mlp.gate_proj``, ``up_proj`` and
``down_proj``, one tensor each; other runtimes know ``X.experts.0.gate_proj`` and so on, or w1, w3
and w2 where the layer is a ``block_sparse_moe``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from quantcli.layouts.stored import FLOATS, Floats, RowWeight, StoredTensors
from quantcli.layouts.stored_codes import Ranges, StoredCodes
from quantcli.types import TensorInfo

_STACK = re.compile(r"(?P<block>.*)\.switch_mlp\.(?P<part>gate_proj|up_proj|down_proj)\.weight")
_NUMBERED = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def split_experts(
    source: StoredTensors, packed: Mapping[str, RowWeight]
) -> Iterator[tuple[str, RowWeight]]:
    """Every packed weight by its name, stacks of experts as a weight for each.

    Stacks that are stored in floats are taken apart as well.
    """
    for name, weight in packed.items():
        if (found := _STACK.fullmatch(name)) and len(weight.info.shape) == 3:
            yield from _split(found, weight)
        else:
            yield name, weight
    for name, info in source.tensors.items():
        if name not in packed and info.dtype in FLOATS and len(info.shape) == 3:
            found = _STACK.fullmatch(name)
            if found:
                yield from _split(found, RowWeight(info, (name,), partial(_load, name)))


def _split(stack: re.Match[str], weight: RowWeight) -> Iterator[tuple[str, RowWeight]]:
    experts, rows, columns = weight.info.shape
    part = stack["part"]
    if stack["block"].endswith("block_sparse_moe"):
        part = _NUMBERED[part]
    for expert in range(experts):
        name = f"{stack['block']}.experts.{expert}.{part}.weight"
        info = replace(
            weight.info, name=name, shape=(rows, columns), nbytes=weight.info.nbytes // experts
        )
        yield name, _cut(info, weight, expert * rows)


def _cut(info: TensorInfo, weight: RowWeight, first: int) -> RowWeight:
    """The matrix of a stack that begins at its row ``first``."""

    def decode(source: StoredTensors, start: int, stop: int) -> Floats:
        return weight.decode(source, first + start, first + stop)

    coded = weight.coded
    if coded is None:
        return RowWeight(info, weight.parts, decode)
    codes, ranges = coded.codes, coded.ranges

    def own_codes(source: StoredTensors, start: int, stop: int) -> np.ndarray:
        return codes(source, first + start, first + stop)

    def own_ranges(source: StoredTensors, start: int, stop: int) -> Ranges:
        return ranges(source, first + start, first + stop)

    own = StoredCodes(coded.grid, own_codes, own_ranges, coded.whole, coded.multiplies)
    return RowWeight(info, weight.parts, decode, own)


def _load(name: str, source: StoredTensors, start: int, stop: int) -> Floats:
    return source.load(name, (start, stop)).astype(np.float32)
