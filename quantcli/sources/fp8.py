"""FP8 checkpoints: which method quantized them, and the scales that give the weights back.

A weight in E4M3 stands for ``code * scale`` in float32. The scale is a tensor beside it, named
with ``_scale_inv`` (DeepSeek; multiplied all the same) or ``_scale`` (compressed-tensors, FBGEMM,
ModelOpt), and holds one number for the tensor, for each matrix of a stack, for each row, or for
each block of ``weight_block_size`` rows and columns; blocks at the right and bottom edge may be
cut short. Only the scales of the rows asked for are read, so memory stays bounded.

Every other way of storing quantized weights (GPTQ, AWQ, bitsandbytes, MXFP4, packed integers) is
refused: quantizing what was rounded once already costs quality that nobody would see.
Sources: DeepSeek-V3's weight_dequant, compressed-tensors' config_groups, ModelOpt's quant_algo.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.types import TensorInfo

DTYPE = "F8_E4M3"
SCALE_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E8M0")
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
_ACTIVATION_SUFFIXES = (
    ".input_scale", ".input_scale_ub", ".output_scale", ".activation_scale", "_activation_scale",
    ".q_scale", ".k_scale", ".v_scale",
)  # fmt: skip
"""Scales of activations and caches; only an FP8 runtime has a use for them."""

_CODES: NDArray[np.float32] = (
    np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
)
_STRIP = 1 << 18
"""Codes decoded at once: NumPy widens the indices eightfold."""


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale tensor of one weight, seen as (matrices, grid rows, grid columns)."""

    name: str
    matrices: int
    grid_rows: int
    grid_columns: int
    block_rows: int
    block_columns: int

    def row_numbers(self, start: int, stop: int, rows: int) -> NDArray[np.int64]:
        """Flattened scale row of each of the weight's flattened rows ``start:stop``."""
        numbers = np.arange(start, stop, dtype=np.int64)
        matrix = numbers // rows if self.matrices > 1 else 0
        return np.asarray(matrix * self.grid_rows + (numbers % rows) // self.block_rows)


def block_size(config: Mapping[str, Any], path: Path) -> tuple[int, int] | None:
    """Rows and columns of a scale block as config.json declares them, None when it does not.

    SourceError when the checkpoint was quantized by a method other than FP8.
    """
    settings = _settings(config, path)
    if settings is None:
        return None
    method = str(settings.get("quant_method", "unknown"))
    declared: Any = None
    if method in ("fp8", "fbgemm_fp8"):
        declared = settings.get("weight_block_size")
    elif method == "compressed-tensors":
        declared = _compressed_block(settings, path)
    elif method != "modelopt" or settings.get("quant_algo") != "FP8":
        raise _refusal(method, settings, path)
    if declared is None:
        return None
    if (
        not isinstance(declared, list)
        or len(declared) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in declared)
    ):
        raise SourceError(
            f"{path}: weight_block_size is {declared!r}; two positive whole numbers belong there"
        )
    return declared[0], declared[1]


def _settings(config: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    text_config = config.get("text_config")
    for owner in (config, text_config if isinstance(text_config, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            settings = owner.get(key)
            if settings is None:
                continue
            if not isinstance(settings, Mapping):
                raise SourceError(f"{path}: {key} is not an object")
            return settings
    return None


def _compressed_block(settings: Mapping[str, Any], path: Path) -> Any:
    groups = settings.get("config_groups")
    weights = [
        group.get("weights")
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping)
    ]
    fp8 = [w for w in weights if isinstance(w, Mapping) and _is_float8(w)]
    if not fp8 or len(fp8) != len(weights):
        raise _refusal("compressed-tensors", settings, path)
    blocks = [w.get("block_structure") for w in fp8 if w.get("block_structure") is not None]
    if any(block != blocks[0] for block in blocks):
        raise SourceError(f"{path}: config_groups declare several block structures: {blocks}")
    return blocks[0] if blocks else None


def _is_float8(weights: Mapping[str, Any]) -> bool:
    return weights.get("type") == "float" and weights.get("num_bits") == 8


def _refusal(method: str, settings: Mapping[str, Any], path: Path) -> SourceError:
    detail = settings.get("quant_algo") or settings.get("format")
    named = f"{method} ({detail})" if detail else method
    return SourceError(
        f"{path}: the checkpoint is already quantized with {named}; of quantized checkpoints only "
        "FP8 (E4M3) ones are read",
        hint="take the original weights in BF16, F16 or F32",
    )


def pair_scales(
    tensors: Mapping[str, TensorInfo], block: tuple[int, int] | None
) -> dict[str, Scale]:
    """The scale of every FP8 weight; SourceError names the weight that lacks a fitting one."""
    found: dict[str, Scale] = {}
    for name, info in tensors.items():
        if info.dtype != DTYPE:
            continue
        beside = [name + suffix for suffix in _SCALE_SUFFIXES if name + suffix in tensors]
        if not beside:
            raise SourceError(
                f"{info.file}: tensor {name!r} is FP8 but has no scale beside it "
                f"(looked for {name}_scale_inv and {name}_scale)"
            )
        found[name] = _fit_scale(info, tensors[beside[0]], block)
    return found


def hidden_names(tensors: Mapping[str, TensorInfo], scales: Mapping[str, Scale]) -> set[str]:
    """Tensors of an FP8 checkpoint that are no weights: the scales of weights and activations."""
    if not scales:
        return set()
    hidden = {scale.name for scale in scales.values()}
    return hidden | {name for name in tensors if name.endswith(_ACTIVATION_SUFFIXES)}


def _fit_scale(weight: TensorInfo, scale: TensorInfo, block: tuple[int, int] | None) -> Scale:
    where = f"{scale.file}: tensor {scale.name!r}"
    if scale.dtype not in SCALE_DTYPES:
        raise SourceError(f"{where} is the scale of an FP8 weight but has dtype {scale.dtype}")
    shape = (1, 1, *weight.shape)[-max(2, len(weight.shape)) :]
    stack, (rows, columns) = shape[:-2], shape[-2:]
    matrices = math.prod(stack)
    if scale.elements == 1:
        return Scale(scale.name, 1, 1, 1, max(rows, 1), max(columns, 1))
    if scale.shape in (stack, (*stack, 1), (*stack, 1, 1)):
        return Scale(scale.name, matrices, 1, 1, rows, columns)
    if scale.shape in ((*stack, rows), (*stack, rows, 1)):
        return Scale(scale.name, matrices, rows, 1, 1, columns)
    if len(scale.shape) == len(shape) and block is None:
        raise SourceError(
            f"{where} scales blocks of {weight.name!r}, but config.json has no weight_block_size"
        )
    if block is not None:
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        if scale.shape == (*stack, *grid):
            return Scale(scale.name, matrices, *grid, *block)
    raise SourceError(
        f"{where} has shape {list(scale.shape)}, which scales neither the whole, the rows nor the "
        f"blocks of {weight.name!r} with shape {list(weight.shape)}"
        + (f" and blocks of {list(block)}" if block else "")
    )


def decode(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], first_column: int, block_columns: int
) -> NDArray[np.float32]:
    """Float32 weights of E4M3 ``codes`` (rows, columns).

    ``scales`` is (rows, grid columns) from the block that holds ``first_column`` on; each product
    is rounded once, as float32. NaN codes stay NaN, for the caller to refuse.
    """
    weights = np.empty(codes.shape, dtype=np.float32)
    step = max(1, _STRIP // max(1, codes.shape[1]))
    for top in range(0, codes.shape[0], step):
        np.take(_CODES, codes[top : top + step], out=weights[top : top + step], mode="clip")
    for index, columns in enumerate(_block_columns(codes.shape[1], first_column, block_columns)):
        weights[:, columns] *= scales[:, index, None]
    return weights


def _block_columns(width: int, first_column: int, block_columns: int) -> Iterator[slice]:
    """The column ranges that share a scale, counted from the first column at hand."""
    edge = 0
    while edge < width:
        reach = block_columns - (first_column + edge) % block_columns
        yield slice(edge, min(edge + reach, width))
        edge += reach
