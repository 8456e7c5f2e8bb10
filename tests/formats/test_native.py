"""The typed wrapper and the binding: dtypes, refusals, and the choice of an instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from support import ggml, rows

from quantcli import _native
from quantcli.errors import UsageError, WeightError
from quantcli.formats import FORMATS, BlockFormat, get_format, native

STORED = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}

SCALED = [
    name
    for name, fmt in ((name, get_format(name)) for name in FORMATS)
    if fmt.block > 1 and (fmt.half_scales or fmt.first_infinite is not None)
]
"""Formats with scales that a weight can be too large for."""


def encode(fmt: BlockFormat, x: np.ndarray) -> np.ndarray:
    return native.encode(fmt, x, rows.needed(fmt, x.shape[1]))


@pytest.mark.parametrize("stored", STORED)
def test_stored_dtypes_are_converted_exactly(fmt: BlockFormat, isa: str, stored: str) -> None:
    x = rows.make("random", 9, 3 * max(fmt.block, 32)).astype(STORED[stored])
    want = encode(fmt, x.astype(np.float32))
    np.testing.assert_array_equal(encode(fmt, x), want)


@pytest.mark.parametrize("stored", ["F16", "BF16", "F8_E4M3"])
def test_every_stored_value_converts(isa: str, stored: str) -> None:
    dtype = np.dtype(STORED[stored])
    every = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype)
    got, want = native.to_float32(every[None])[0], every.astype(np.float32)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_halves_round_to_even_everywhere(isa: str, name: str) -> None:
    """Each representable value, its neighbours and the exact middles between two of them."""
    every = np.arange(1 << 16, dtype=np.uint16)
    half = every.view(np.float16).astype(np.float32) if name == "F16" else None
    base = every.astype(np.uint32) << 16 if half is None else half.view(np.uint32)
    middle = 1 << (15 if half is None else 12)
    x = np.concatenate([base + step for step in (0, 1, middle - 1, middle, middle + 1)])
    x = x.astype(np.uint32).view(np.float32)
    limit = 65519 if name == "F16" else 3.3895e38
    x = x[np.abs(x) < limit][None]
    dtype = np.float16 if name == "F16" else ml_dtypes.bfloat16
    got = native.encode(get_format(name), x)
    np.testing.assert_array_equal(got, x.astype(dtype).view(np.uint8).reshape(1, -1))


def test_out_receives_the_rows_in_place() -> None:
    fmt = get_format("Q8_0")
    whole = np.zeros((8, fmt.row_bytes(64)), np.uint8)
    x = rows.make("random", 8, 64)
    native.encode(fmt, x[2:6], out=whole[2:6])
    np.testing.assert_array_equal(whole[2:6], native.encode(fmt, x)[2:6])
    assert not whole[:2].any()
    assert not whole[6:].any()
    values = np.empty((8, 64), np.float32)
    assert native.decode(fmt, whole, out=values) is values


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_rows_in_the_format_already_are_not_copied(name: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).view(STORED[name])
    x = bits[np.isfinite(bits.astype(np.float32))].reshape(2, -1)
    packed = native.encode(get_format(name), x)
    assert np.shares_memory(packed, x)
    want = ggml.quantize(get_format(name).type_id, x.astype(np.float32), None)
    np.testing.assert_array_equal(packed, want)


def test_rows_need_not_be_contiguous_or_aligned() -> None:
    fmt = get_format("Q4_0")
    x = rows.make("random", 6, 64)
    want = native.encode(fmt, x)
    np.testing.assert_array_equal(native.encode(fmt, np.asfortranarray(x)), want)
    shifted = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    np.testing.assert_array_equal(native.encode(fmt, shifted), want)


def test_threads_give_the_same_bytes(fmt: BlockFormat) -> None:
    x = rows.make("random", 64, 4 * max(fmt.block, 32))
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda i: encode(fmt, x[i : i + 4]), range(0, 64, 4)))
    np.testing.assert_array_equal(np.concatenate(parts), encode(fmt, x))


def test_flush_to_zero_in_the_process_changes_nothing(fmt: BlockFormat, isa: str) -> None:
    torch = pytest.importorskip("torch")
    x = rows.make("tiny", 4, 2 * max(fmt.block, 32))
    want = encode(fmt, x)
    flushed = torch.set_flush_denormal(True)
    try:
        got = encode(fmt, x)
        back = native.decode(fmt, got)
    finally:
        torch.set_flush_denormal(False)
    assert flushed
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(back.view(np.uint32), native.decode(fmt, want).view(np.uint32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", ["F64", "F32", "F16", "BF16"])
def test_a_weight_that_is_not_finite_is_named(
    fmt: BlockFormat, isa: str, stored: str, value: float
) -> None:
    columns = 3 * max(fmt.block, 32)
    x = rows.make("random", 40, columns).astype(STORED[stored])
    x[37, columns - 2] = x[39, 0] = value
    with pytest.raises(native.UnencodableError, match="not a finite number") as caught:
        encode(fmt, x)
    assert (caught.value.row, caught.value.column) == (37, columns - 2)
    np.testing.assert_equal(caught.value.value, value)
    assert isinstance(caught.value, WeightError)


def test_a_weight_beyond_float32_is_named() -> None:
    x = np.zeros((3, 32))
    x[1, 5] = 1e300
    with pytest.raises(native.UnencodableError, match=r"1e\+300 at row 1, column 5 is beyond"):
        native.encode(get_format("F32"), x)


def test_a_scale_that_overflows_is_refused(fmt: BlockFormat, isa: str) -> None:
    """llama.cpp stores an infinity, and its loader then refuses the file."""
    columns = 3 * max(fmt.block, 32)
    x = rows.make("random", 5, columns)
    # Q3_K and Q6_K sum cubes; where those overflow, ggml passes over the block with a finite scale.
    x[3, columns - 7] = np.float32(-3.4e38 if fmt.block == 1 else -1e12)
    if not fmt.half_scales and fmt.first_infinite is None and fmt.holds == 0:
        assert encode(fmt, x).shape == (5, fmt.row_bytes(columns))
        return
    with pytest.raises(native.UnencodableError, match=f"overflows .*{fmt.name}") as caught:
        encode(fmt, x)
    assert (caught.value.row, caught.value.column) == (3, columns - 7)


@pytest.mark.parametrize("fmt", SCALED, indirect=True)
@pytest.mark.parametrize("stored", ["F32", "BF16", "F64"])
@pytest.mark.parametrize("value", [2.0**28, 1e18, -1e20, 1e30, -3e38])
def test_a_weight_that_no_scale_reaches_is_refused(
    fmt: BlockFormat, stored: str, value: float
) -> None:
    """A flipped bit of an exponent; some of llama.cpp's searches write zeros for it."""
    x = np.random.default_rng(5).normal(0, 0.02, (3, 512)).astype(STORED[stored])
    x[1, 300] = value
    for importance in (None, np.linspace(0.1, 2, 512, dtype=np.float32)):
        if importance is None and fmt.needs_importance:
            continue
        with pytest.raises(native.UnencodableError, match=f"overflows .*{fmt.name}") as refused:
            native.encode(fmt, x, importance)
        assert (refused.value.row, refused.value.column) == (1, 300)


@pytest.mark.parametrize("value", [2688.0, -2688.0, 1600.0])
def test_nvfp4_keeps_what_its_largest_scale_holds(isa: str, value: float) -> None:
    fmt, x = get_format("NVFP4"), rows.make("random", 6, 192)
    x[1:5, 70] = value
    got = native.decode(fmt, native.encode(fmt, x))
    assert np.abs(got[1:5, 70] - value).max() <= 192


@pytest.mark.parametrize("value", [2689.0, -1e5, 3.4e38])
def test_nvfp4_refuses_what_llama_cpp_would_clip(isa: str, value: float) -> None:
    fmt, x = get_format("NVFP4"), rows.make("random", 6, 192)
    x[1, 70], x[4, 100] = 2688, value
    with pytest.raises(native.UnencodableError, match="overflows an 8-bit scale of NVFP4") as it:
        native.encode(fmt, x)
    assert (it.value.row, it.value.column) == (4, 100)


@pytest.mark.parametrize(
    ("value", "fits"), [(2.0**-125, True), (2.0**-126, False), (1.9e-38, False), (1e-38, True)]
)
def test_mxfp4_refuses_the_exponent_that_is_no_number(isa: str, value: float, fits: bool) -> None:
    """llama.cpp's own check of its output fails there; every other tiny weight becomes zero."""
    fmt, x = get_format("MXFP4"), np.zeros((3, 64), np.float32)
    x[1, 40] = value
    if fits:
        back = native.decode(fmt, native.encode(fmt, x))
        assert np.abs(back - x).max() <= np.float32(1e-38)
        return
    with pytest.raises(native.UnencodableError, match="underflows an 8-bit scale of MXFP4") as it:
        native.encode(fmt, x)
    assert (it.value.row, it.value.column) == (1, 40)


def test_the_largest_that_fits_is_kept() -> None:
    x = np.float32([[65504.0, -65504.0, 65519.0, 0]])
    packed = native.encode(get_format("F16"), x)
    np.testing.assert_array_equal(packed.view(np.float16)[0], [65504, -65504, 65504, 0])
    with pytest.raises(native.UnencodableError, match=r"65520\.0 at row 0, column 3 overflows F16"):
        native.encode(get_format("F16"), np.float32([[1, 2, 3, 65520.0]]))


def test_no_rows_and_no_columns() -> None:
    fmt = get_format("Q4_0")
    assert native.encode(fmt, np.zeros((0, 32), np.float32)).shape == (0, fmt.nbytes)
    assert native.encode(fmt, np.zeros((3, 0), np.float32)).shape == (3, 0)
    assert native.decode(fmt, np.zeros((0, fmt.nbytes), np.uint8)).shape == (0, 32)


def test_programming_errors_are_refused() -> None:
    fmt, x = get_format("Q4_0"), np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match="do not divide into Q4_0 blocks of 32"):
        native.encode(fmt, x[:, :40])
    with pytest.raises(ValueError, match="weights has length 63, expected 64"):
        native.encode(fmt, x, np.ones(63, np.float32))
    with pytest.raises(TypeError, match="int32"):
        native.encode(fmt, x.astype(np.int32))
    with pytest.raises(TypeError, match=">f4"):
        native.encode(fmt, x.astype(">f4"))
    with pytest.raises(ValueError, match="out has shape"):
        native.encode(fmt, x, out=np.zeros((2, 35), np.uint8))
    with pytest.raises(ValueError, match="out is not contiguous"):
        native.encode(fmt, x, out=np.zeros((2, 72), np.uint8)[:, ::2])
    with pytest.raises(ValueError, match="not whole Q4_0 blocks of 18"):
        native.decode(fmt, np.zeros((2, 35), np.uint8))
    with pytest.raises(ValueError, match="out is not a contiguous array"):
        native.decode(fmt, np.zeros((2, 36), np.uint8), out=np.zeros((2, 63), np.float32))


def test_the_binding_checks_every_buffer() -> None:
    src, dst = np.zeros(256, np.uint8), np.zeros(36, np.uint8)
    with pytest.raises(ValueError, match="type 4 is unknown"):
        _native.encode(4, 0, src, 1, 64, dst)
    with pytest.raises(ValueError, match="type -1 is unknown"):
        _native.block_size(-1)
    with pytest.raises(ValueError, match="no kernel that encodes type 28"):
        _native.encode(28, 0, src, 1, 64, dst)
    with pytest.raises(ValueError, match="2 is not a float dtype"):
        _native.encode(2, 2, src, 1, 64, dst)
    with pytest.raises(ValueError, match="src has length 256, expected 512"):
        _native.encode(2, 0, src, 2, 64, dst)
    with pytest.raises(ValueError, match="dst has length 35, expected 36"):
        _native.encode(2, 0, src, 1, 64, dst[:35])
    with pytest.raises(ValueError, match="row length of 60"):
        _native.encode(2, 0, src[:240], 1, 60, dst)
    with pytest.raises(ValueError, match="number of rows is -1"):
        _native.encode(2, 0, src, -1, 64, dst)
    with pytest.raises(ValueError, match="src has length 36, expected 18"):
        _native.decode(2, dst, np.zeros(32, np.float32))
    with pytest.raises(ValueError, match="not whole blocks"):
        _native.first_infinite_scale(2, dst[:35], (0,))
    with pytest.raises(ValueError, match="byte 17 of a block of 18"):
        _native.first_infinite_scale(2, dst, (17,))
    with pytest.raises(ValueError, match="at most 8"):
        _native.first_infinite_scale(2, dst, (0,) * 9)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(UsageError, match=f"'mmx'.*{_native.available()[-1]}"):
        _native.select("mmx")


def _isa_of_a_process(wanted: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from quantcli import _native; print(_native.isa())"],
        env=os.environ | {"QUANTCLI_CPU": wanted},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("wanted", _native.available())
def test_the_environment_chooses_an_instruction_set(wanted: str) -> None:
    assert _isa_of_a_process(wanted).stdout.strip() == wanted


def test_an_impossible_choice_names_what_there_is() -> None:
    done = _isa_of_a_process("z80")
    assert done.returncode != 0
    assert "QUANTCLI_CPU" in done.stderr
    assert ", ".join(_native.available()) in done.stderr
