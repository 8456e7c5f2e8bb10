"""GPTQ's layout, as GPTQModel, vLLM, SGLang and transformers read it, in both versions.

Columns stay in their order (``desc_act`` false), so ``g_idx`` counts up. Modules that are not
quantized are excluded by GPTQModel's ``dynamic`` patterns, and for transformers, which does not
read these, by the list of those that are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from quantcli.artifacts.safetensors_container import Declared
from quantcli.formats.integer import IntegerCodes, IntegerGrid
from quantcli.layouts.base import Packing, Patch, Subject, as_stored
from quantcli.layouts.packing import gptq as packing
from quantcli.layouts.packing.bits import WORD, word_count
from quantcli.types import Matrix


def _declare(matrix: Matrix, grid: IntegerGrid) -> list[Declared]:
    name, groups = matrix.module, grid.groups(matrix.columns)
    return [
        Declared(f"{name}.qweight", "I32", (word_count(matrix.columns, grid.bits), matrix.rows)),
        Declared(f"{name}.qzeros", "I32", (groups, word_count(matrix.rows, grid.bits))),
        Declared(f"{name}.scales", grid.scale_dtype, (groups, matrix.rows)),
        Declared(f"{name}.g_idx", "I32", (matrix.columns,)),
    ]


def _place(
    layout: str, matrix: Matrix, grid: IntegerGrid, start: int, coded: IntegerCodes
) -> Iterator[Patch]:
    name = matrix.module
    zeros = coded.zeros
    if zeros is None:
        zeros = np.full(coded.scales.shape, grid.middle, np.int32)
    yield Patch(f"{name}.qweight", packing.pack_codes(coded.codes, grid.bits), column=start)
    yield Patch(
        f"{name}.qzeros",
        packing.pack_zeros(zeros, grid.bits, layout),
        column=word_count(start, grid.bits),
    )
    yield Patch(f"{name}.scales", as_stored(coded.scales.T, grid), column=start)
    if start == 0:
        size = grid.group_size or matrix.columns
        groups = np.arange(matrix.columns, dtype=np.int32) // size
        yield Patch(f"{name}.g_idx", groups[None])


def _describe(layout: str, subject: Subject) -> dict[str, Any]:
    grid = subject.grid
    inner = [name for name in subject.kept if name != "lm_head"]
    settings: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size or -1,
        "desc_act": False,
        "sym": grid.symmetric,
        "lm_head": False,
        "checkpoint_format": layout,
        "pack_dtype": "int32",
    }
    if inner:
        settings["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in inner}
        settings["modules_in_block_to_quantize"] = [_endings(subject.quantized, inner)]
    return {"quantization_config": settings}


def _endings(quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """The shortest of names' endings that tell the quantized modules from the kept ones."""
    others = {_last(name) for name in kept}
    return sorted({name if _last(name) in others else _last(name) for name in quantized})


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _refuse(matrix: Matrix, grid: IntegerGrid) -> str | None:
    if matrix.rows % WORD or matrix.columns % WORD:
        return f"both its sides must be multiples of {WORD}"
    return None


VERSION_1 = Packing(_declare, partial(_place, "gptq"), partial(_describe, "gptq"), _refuse)
VERSION_2 = Packing(_declare, partial(_place, "gptq_v2"), partial(_describe, "gptq_v2"), _refuse)
