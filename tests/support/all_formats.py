"""Block formats by their constants alone, so that every mixture of llama.cpp can be compared.

A plan needs no more of a format than its sizes and its fallback; where quantcli has no encoder for
one of ggml's types, these stand in.
"""

from __future__ import annotations

import ctypes
from typing import NoReturn

import pytest
from support.ggml import library

from quantcli.formats import FORMATS, BlockFormat

_FALLBACKS = {
    "IQ4_NL": "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_XS",
    "Q4_0": "Q2_0 Q2_K Q3_K TQ1_0 TQ2_0",
    "Q5_0": "Q4_K",
    "Q5_1": "Q5_K",
    "Q8_0": "Q6_K",
}
_NOT_FOR_WEIGHTS = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
_LAST_TYPE = 42


def ggml_types() -> dict[str, int]:
    """The ids of ggml's types by their upper-case names."""
    library().ggml_type_name.restype = ctypes.c_char_p
    names = {i: library().ggml_type_name(i) for i in range(_LAST_TYPE + 1)}
    return {name.decode().upper(): i for i, name in names.items() if name and b"DEPREC" not in name}


def _refuse(*_: object) -> NoReturn:
    raise AssertionError("a plan encodes nothing")


def install(patch: pytest.MonkeyPatch) -> None:
    """Add every missing block format to quantcli's table."""
    library().ggml_blck_size.restype = ctypes.c_int64
    library().ggml_type_size.restype = ctypes.c_size_t
    for name, type_id in ggml_types().items():
        if name in _NOT_FOR_WEIGHTS or name in FORMATS:
            continue
        stand_in = BlockFormat(
            name, type_id,
            library().ggml_blck_size(type_id), library().ggml_type_size(type_id),
            quantize=_refuse, dequantize=_refuse,
            fallback=next((to for to, who in _FALLBACKS.items() if name in who.split()), None),
            needs_importance=bool(library().ggml_quantize_requires_imatrix(type_id)),
        )  # fmt: skip
        patch.setitem(FORMATS._own, name, "")
        patch.setitem(FORMATS._loaded, name, stand_in)
