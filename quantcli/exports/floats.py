"""In which dtype a GGUF's weights become a checkpoint's.

Floats keep their own where one dtype holds all of them exactly; GGUF stores norms and biases of a
16-bit model in F32, so those are looked at: mostly they came from that dtype and go back without
loss. Quantized weights have no dtype to go back to. A block's scale is a float16 times small
integers, so F16 (11 bits) is nearer to them than BF16 (8 bits); but models of the Gemma family
have activations beyond F16's 65504, and weights are loaded in the dtype in which a model runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.checkpoint_view import CheckpointView
from quantcli.errors import UsageError
from quantcli.formats import get_format, native
from quantcli.model import Model
from quantcli.types import TensorStore

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""By the name that ``--dtype`` takes."""
_WIDE = ("gemma2", "gemma3", "gemma3n", "gemma4", "gemma-embedding")
"""Architectures whose activations overflow float16."""
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class FloatChoice:
    """``stored`` is each tensor's dtype in the files by its stored name, ``loaded`` the model's.

    They differ where a few tensors need F32 and the rest does not. ``note`` says why, or nothing.
    """

    loaded: str
    stored: dict[str, str]
    note: str = ""


def parse_dtype(name: str) -> str:
    """ "F32", "F16" or "BF16" from ``--dtype``'s word; UsageError for another."""
    found = DTYPES.get(name.lower())
    if found is None:
        raise UsageError(f"there is no dtype {name!r} here", hint=f"one of {', '.join(DTYPES)}")
    return found


def choose_floats(model: Model, view: CheckpointView, wanted: str | None) -> FloatChoice:
    """The dtypes of a checkpoint made of ``model``; reads its F32 tensors where it is 16-bit."""
    if wanted is not None:
        return FloatChoice(wanted, dict.fromkeys(view.tensors, wanted))
    kinds = {tensor.dtype for tensor in model.tensors} - {"F32", "F64"}
    if not kinds or kinds == {"F16", "BF16"}:
        return FloatChoice("F32", dict.fromkeys(view.tensors, "F32"))
    quantized = sorted(kinds - {"F16", "BF16"})
    if quantized:
        return _choose_for_blocks(model, view, quantized)
    (kind,) = kinds
    inexact = [
        name for name in view.tensors
        if view.holder(name).dtype in ("F32", "F64") and not fits(view, name, kind)
    ]  # fmt: skip
    stored = dict.fromkeys(view.tensors, kind) | dict.fromkeys(inexact, "F32")
    if not inexact:
        return FloatChoice(kind, stored)
    note = (
        f"{len(inexact)} tensors such as {inexact[0]} have values that {kind} does not hold, so "
        f"they stay F32, and config.json has the model loaded in float32; --dtype {kind.lower()} "
        "rounds them"
    )
    return FloatChoice("F32", stored, note)


def _choose_for_blocks(model: Model, view: CheckpointView, quantized: list[str]) -> FloatChoice:
    if model.arch in _WIDE:
        dtype, why = "BF16", f"activations of {model.arch} models overflow float16"
    else:
        dtype, why = "F16", "it keeps more of their digits than BF16"
    note = (
        f"weights in {', '.join(quantized)} are decoded to {dtype}, since {why}; --dtype "
        f"{'f16' if dtype == 'BF16' else 'bf16'} takes the other, --dtype f32 loses nothing"
    )
    return FloatChoice(dtype, dict.fromkeys(view.tensors, dtype), note)


def fits(view: TensorStore, name: str, dtype: str) -> bool:
    """Whether every value of a tensor is a number of ``dtype``; reads it until one is not."""
    shape = view.tensors[name].shape
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    for start in range(0, rows, _ROWS):
        values = view.read_rows(name, start, min(start + _ROWS, rows)).astype(np.float32)
        fmt = get_format(dtype)
        try:
            again = native.decode(fmt, native.encode(fmt, values))
        except native.UnencodableError:
            return False
        if not np.array_equal(again, values):
            return False
    return True


def cast(rows: NDArray[Any], dtype: str) -> NDArray[np.uint8]:
    """Float rows as little-endian bytes in ``dtype``; UnencodableError for what overflows."""
    return native.encode(get_format(dtype), rows)
