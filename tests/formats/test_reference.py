"""The NumPy references say the same as the kernels, and as others' readers."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from support import ggml, ggml_reader, rows

from quantcli import _native
from quantcli.formats import FORMATS, BlockFormat, format_by_id, get_format, native


@pytest.mark.parametrize("weighing", rows.IMPORTANCES)
@pytest.mark.parametrize("kind", rows.KINDS)
def test_reference_equals_llama_cpp(fmt: BlockFormat, kind: str, weighing: str) -> None:
    columns = 3 * max(fmt.block, 32)
    x = rows.survivable(fmt, rows.make(kind, 3, columns))
    importance = rows.importance(weighing, columns)
    if importance is None:
        importance = rows.needed(fmt, columns)
    want = ggml.quantize(fmt.type_id, x, importance)
    np.testing.assert_array_equal(fmt.quantize(x, importance), want)


IN_GGUF = {kind.name for kind in gguf.quants._type_traits} | {"F32", "F16"}
"""The formats that the gguf package decodes; the others are newer."""


@pytest.mark.parametrize("columns", [1, 7])
def test_decoding_equals_llama_cpp_and_gguf(fmt: BlockFormat, isa: str, columns: int) -> None:
    """Any bytes at all: codes, scales, infinities and NaN."""
    rng = np.random.default_rng(3)
    packed = rng.integers(0, 256, (40, fmt.row_bytes(columns * fmt.block)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        wanted = [fmt.dequantize(packed)]
        if fmt.name != "F32":
            wanted.append(ggml.dequantize(fmt.type_id, packed))
        if fmt.name in IN_GGUF:
            wanted.append(gguf.quants.dequantize(packed, GGMLQuantizationType[fmt.name]))
    assert len(wanted) > 1
    for want in wanted:
        np.testing.assert_array_equal(native.decode(fmt, packed), want)


def test_signed_zeros_decode_alike(fmt: BlockFormat, isa: str) -> None:
    columns = 2 * max(fmt.block, 32)
    packed = fmt.quantize(rows.make("signed zeros", 4, columns), rows.needed(fmt, columns))
    got, want = native.decode(fmt, packed), fmt.dequantize(packed)
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_sizes_equal_llama_cpp(fmt: BlockFormat) -> None:
    name, block, nbytes = ggml_reader.type_traits(fmt.type_id)
    assert (fmt.name, fmt.block, fmt.nbytes) == (name.upper(), block, nbytes)
    assert _native.block_size(fmt.type_id) == (fmt.block, fmt.nbytes)
    assert fmt.bits == 8 * fmt.nbytes / fmt.block


def test_every_size_the_binding_checks_by_equals_gguf() -> None:
    for kind, sizes in GGML_QUANT_SIZES.items():
        if kind.name.startswith(("I8", "I16", "I32", "I64", "Q8_1", "Q8_K")):
            continue
        assert _native.block_size(int(kind)) == sizes, kind.name


WITHOUT_FALLBACK = {"Q1_0", "NVFP4"}
"""Where llama.cpp stops: "no tensor type fallback is defined for type"."""


def test_fallbacks_are_registered_and_fit_where_the_format_does_not(fmt: BlockFormat) -> None:
    if fmt.fallback is None:
        assert fmt.block <= 32 or fmt.name in WITHOUT_FALLBACK
    else:
        assert get_format(fmt.fallback).block < fmt.block


def test_formats_are_found_by_id() -> None:
    for name in FORMATS:
        assert format_by_id(get_format(name).type_id) is get_format(name)
    assert format_by_id(4) is None
