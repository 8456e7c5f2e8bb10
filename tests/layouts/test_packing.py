"""Packed codes against the layouts' definitions: one Python integer for each stream of bits."""

import numpy as np
import pytest

from quantcli.layouts import awq, gptq, mlx, words
from quantcli.layouts.compressed_tensors import packed as compressed_tensors

RNG = np.random.default_rng(5)


def codes_of(rows: int, columns: int, width: int) -> np.ndarray:
    return RNG.integers(0, 1 << width, (rows, columns)).astype(np.uint8)


def stream(words: np.ndarray) -> int:
    """The words as one little-endian number."""
    return int.from_bytes(np.ascontiguousarray(words).astype("<u4").tobytes(), "little")


def element(number: int, index: int, width: int) -> int:
    return number >> (index * width) & ((1 << width) - 1)


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("count", [32, 64, 7, 33])
def test_element_i_lies_at_bit_i_times_width(width, count):
    codes = codes_of(3, count, width)
    found = words.pack_bits(codes, width)
    assert found.shape == (3, -(-count * width // 32))
    for row, packed in zip(codes, found, strict=True):
        assert [element(stream(packed), i, width) for i in range(count)] == row.tolist()
        assert stream(packed) >> (count * width) == 0
    assert np.array_equal(words.unpack_bits(found, width, count), codes)


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("rows", [32, 12])
def test_compressed_tensors_packs_as_the_library_does(width, rows):
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes, zeros = codes_of(rows, 96, width), codes_of(rows, 3, width)
    half = 1 << (width - 1)

    def theirs(values, **where):
        signed = torch.from_numpy((values.astype(np.int16) - half).astype(np.int8))
        return helpers.pack_to_int32(signed, width, **where).numpy()

    packed = compressed_tensors.pack_codes(codes, width)
    assert np.array_equal(packed, theirs(codes))
    packed_zeros = compressed_tensors.pack_zeros(zeros, width)
    assert np.array_equal(packed_zeros, theirs(zeros, packed_dim=0))
    assert np.array_equal(compressed_tensors.unpack_codes(packed, width, 96), codes)
    assert np.array_equal(compressed_tensors.unpack_zeros(packed_zeros, width, rows), zeros)


@pytest.mark.parametrize("width", gptq.BITS)
@pytest.mark.parametrize("layout", gptq.STORED_LESS)
def test_gptq_packs_along_the_inputs(width, layout):
    codes, zeros = codes_of(64, 96, width), np.clip(codes_of(64, 3, width), 1, None)
    qweight = gptq.pack_codes(codes, width)
    assert qweight.shape == (96 * width // 32, 64)
    for out in range(64):
        number = stream(qweight[:, out])
        assert [element(number, i, width) for i in range(96)] == codes[out].tolist()
    qzeros = gptq.pack_zeros(zeros, width, layout)
    assert qzeros.shape == (3, 64 * width // 32)
    less = {"gptq": 1, "gptq_v2": 0}[layout]
    for group in range(3):
        number = stream(qzeros[group])
        found = [element(number, i, width) for i in range(64)]
        assert found == (zeros[:, group] - less).tolist()
    assert np.array_equal(gptq.unpack_codes(qweight, width), codes)
    assert np.array_equal(gptq.unpack_zeros(qzeros, width, layout), zeros)


def test_the_symmetric_zero_point_of_gptq_is_the_known_word():
    zeros = np.full((8, 1), 8)
    assert gptq.pack_zeros(zeros, 4, "gptq").view(np.uint32).item() == 0x77777777
    assert gptq.pack_zeros(zeros, 4, "gptq_v2").view(np.uint32).item() == 0x88888888


def test_gptq_refuses_zero_points_that_it_cannot_say():
    with pytest.raises(ValueError, match="gptq does not hold zero points 0 to 0"):
        gptq.pack_zeros(np.zeros((8, 1), int), 4, "gptq")
    with pytest.raises(ValueError, match="gptq_v2 does not hold"):
        gptq.pack_zeros(np.full((8, 1), 16), 4, "gptq_v2")


def test_awq_interleaves_eight_outputs():
    codes = codes_of(16, 5, 4)
    qweight = awq.pack_codes(codes)
    assert qweight.shape == (5, 2)
    for column in range(5):
        for word in range(2):
            number = stream(qweight[column, word])
            for nibble, out in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                assert element(number, nibble, 4) == codes[8 * word + out, column]
    assert np.array_equal(awq.unpack_codes(qweight), codes)


@pytest.mark.parametrize("width", mlx.BITS)
def test_mlx_packs_stacks_row_by_row(width):
    codes = codes_of(6, 64, width).reshape(2, 3, 64)
    words = mlx.pack_codes(codes, width)
    assert words.dtype == np.uint32
    assert [element(stream(words[1, 2]), i, width) for i in range(64)] == codes[1, 2].tolist()
    assert np.array_equal(mlx.unpack_codes(words, width), codes)
