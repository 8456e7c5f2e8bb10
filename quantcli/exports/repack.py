"""A quantized checkpoint as a GGUF of the same weights: its codes in blocks of 32.

GPTQ, AWQ, compressed-tensors and MLX matrices with up to 4, 5 or 8 bits become Q4_0 or Q4_1, Q5_0
or Q5_1, and Q8_0; MXFP4 and NVFP4 stay what they are. Of integers the first rows tell whether they
are symmetric; all are held against what the blocks decode to, and a weight that the blocks do not
hold ends the export: a scale that float16 does not hold, a zero point whose product with the scale
it does not hold, groups that 32 does not divide, or inputs that a checkpoint has reordered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.gguf_file import GgufFile, prepare_gguf
from quantcli.errors import PlanError
from quantcli.exports.blocks import GROUP, MXFP4, encode_mxfp4
from quantcli.exports.exact import fit_rows
from quantcli.exports.float4_blocks import Float4Blocks, block_format
from quantcli.formats import FORMATS, get_format
from quantcli.model import Model
from quantcli.plan.filetypes import find_file_type
from quantcli.plan.planner import TensorPlan, make_plan
from quantcli.plan.recipe import Recipe
from quantcli.types import OutputTensor, PackedType

_CANDIDATES: Mapping[int, tuple[str, ...]] = {
    2: ("Q4_0", "Q4_1"), 3: ("Q4_0", "Q4_1"), 4: ("Q4_0", "Q4_1"), 5: ("Q5_0", "Q5_1"),
    6: ("Q8_0",), 7: ("Q8_0",), 8: ("Q8_0",),
}  # fmt: skip
"""Block formats with at least so many bits, the one without offsets first."""
_TRIED = 64


@dataclass(frozen=True, slots=True)
class _Exactly:
    """Encodes rows of one tensor, or refuses them."""

    model: Model
    group: int
    hint: str

    def __call__(self, item: TensorPlan, start: int, rows: NDArray[Any]) -> NDArray[np.uint8]:
        """Packed rows of the plan's block format; PlanError for the first that it cannot hold."""
        if item.format == MXFP4:
            packed = encode_mxfp4(rows)
            if packed is None:
                raise PlanError(f"{item.tensor.name}: the weights are not MXFP4's", hint=self.hint)
            return packed
        fitted = fit_rows(item.format, rows, self.group)
        if fitted.missed.any():
            row, group = (int(index) for index in np.argwhere(fitted.missed)[0])
            info, row, column = self.model.origin(item.tensor, start + row, group * self.group)
            raise PlanError(
                f"{info.file}: {info.name} ({info.dtype}): {item.format} does not hold the group "
                f"of {self.group} weights at row {row}, column {column}, bit for bit",
                hint=self.hint,
            )
        return fitted.packed


def is_packed(model: Model) -> bool:
    """Whether the checkpoint holds codes of an integer grid."""
    return any(isinstance(tensor.dtype, PackedType) for tensor in model.tensors)


def prepare_repacking(
    model: Model,
    label: str,
    plain: str,
    output: Path,
    *,
    split_max_size: int | None,
    requantize: bool,
    force: bool,
    check: bool,
) -> GgufFile:
    """Decide the GGUF; floats become ``plain`` ("F16" ...). Reads the first rows of each matrix.

    With ``requantize`` what the blocks do not hold is rounded to the nearest that they do.
    PlanError for a matrix on a grid that no block format has.
    """
    hint = (
        f"--requantize rounds such matrices, --dtype f16 decodes them, and quantcli quantize "
        f"{label} --bits 4 quantizes anew; the original model is better"
    )
    recipe = Recipe(
        type=plain,
        allow_requantize=True,
        split_max_size=None if split_max_size is None else str(split_max_size),
    )
    plan = make_plan(model.tensors, model.metadata, recipe)
    items, encoders, copied = [], {}, set[str]()
    floats = Float4Blocks(model, hint)
    for item in plan.items:
        dtype = item.tensor.dtype
        if not isinstance(dtype, PackedType) or len(item.tensor.shape) < 2:
            items.append(item)
            continue
        if dtype in FORMATS:
            blocks = get_format(dtype)
            nbytes = item.tensor.rows * blocks.row_bytes(item.tensor.columns)
            items.append(replace(item, format=blocks.name, nbytes=nbytes, reason="its own blocks"))
            copied.add(blocks.name)
            continue
        small = None if requantize else block_format(model, item.tensor)
        if small is not None:
            floats.add(item.tensor, small)
            nbytes = item.tensor.rows * get_format(small).row_bytes(item.tensor.columns)
            items.append(replace(item, format=small, nbytes=nbytes, reason=f"the codes of {dtype}"))
            copied.add(small)
            continue
        kind, group, exact = _choose(model, item.tensor, dtype, requantize, hint)
        nbytes = item.tensor.rows * get_format(kind).row_bytes(item.tensor.columns)
        items.append(replace(item, format=kind, nbytes=nbytes, reason=f"the codes of {dtype}"))
        if exact:
            encoders[item.tensor.name] = _Exactly(model, group, hint)
    types = copied | {item.format for item in items if item.tensor.name in encoders}
    name = "Q4_1" if "Q4_1" in types else min(types, default="Q4_0")
    name = "MXFP4_MOE" if name == MXFP4 else name
    plan = replace(
        plan, items=tuple(items), file_type=find_file_type(name).id, recipe=Recipe(type=name)
    )
    job = prepare_gguf(model, recipe, output, plan=plan, force=force, check=check)
    return replace(job, encoders={**job.encoders, **encoders, **floats.encoders()})


def _choose(
    model: Model, tensor: OutputTensor, dtype: PackedType, requantize: bool, hint: str
) -> tuple[str, int, bool]:
    """The block format, the columns that share a scale, and whether the codes are kept."""
    if dtype.upper().endswith(MXFP4):
        return MXFP4, GROUP, True
    bits, group = dtype.bits, dtype.group
    candidates = _CANDIDATES.get(bits, ())
    if candidates and group % GROUP == 0 and group:
        rows = model.read_rows(tensor, 0, min(_TRIED, tensor.rows))
        for kind in candidates:
            if not fit_rows(kind, rows, group).missed.any():
                return kind, group, True
    if requantize:
        return (candidates or ("Q8_0",))[0], group, False
    why = "is on a grid that no block format has"
    if candidates:
        why = f"does not fit {' or '.join(candidates)} bit for bit"
    raise PlanError(f"{model.label}: {tensor.name} ({tensor.dtype}) {why}", hint=hint)
