"""Codebook blocks taken apart and put together again, against gguf's decoder."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
from support import rows

from quantcli.formats import get_format, native
from quantcli.formats.codebook_lattice import CODEBOOKS, SIGNS_SHIFT
from quantcli.formats.grids import load_grid


def _blocks(name: str) -> np.ndarray:
    """Blocks as encoded, some of them with sub-blocks of zeros, and blocks of any bytes."""
    fmt = get_format(name)
    x = rows.make("heavy-tailed", 24, 1024)
    x[::3, 64:96] = 0
    weights = rows.make("random", 1, 1024)[0] ** 2
    encoded = native.encode(fmt, x, weights).reshape(-1, fmt.nbytes)
    anything = np.random.default_rng(5).integers(0, 256, (64, fmt.nbytes), np.uint8)
    if name == "IQ1_M":
        anything[:, 55] &= 0x3F  # likewise
    else:
        anything[:, 1] &= 0x3B  # a finite, positive scale
    return np.concatenate([encoded, anything])


def _gguf_values(name: str, blocks: np.ndarray) -> np.ndarray:
    return gguf.dequantize(blocks, getattr(gguf.GGMLQuantizationType, name))


@pytest.mark.parametrize("name", CODEBOOKS)
def test_joining_what_was_split_gives_the_same_bytes(name: str) -> None:
    blocks = _blocks(name)
    lattice = CODEBOOKS[name]
    np.testing.assert_array_equal(lattice.join(lattice.split(blocks)), blocks)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_what_was_split_has_the_values_that_are_decoded(name: str) -> None:
    blocks = _blocks(name)
    lattice = CODEBOOKS[name]
    np.testing.assert_array_equal(lattice.values(lattice.split(blocks)), _gguf_values(name, blocks))


@pytest.mark.parametrize("name", CODEBOOKS)
def test_any_codes_decode_to_their_points(name: str) -> None:
    """Also points, signs and scales that the encoder would not have chosen."""
    lattice = CODEBOOKS[name]
    parts = lattice.split(_blocks(name))
    draw = np.random.default_rng(7)
    minus = draw.integers(0, 2, (len(parts.d), 32, 8))
    if lattice.even_signs:
        minus[:, :, 7] = minus[:, :, :7].sum(axis=2) % 2
    minus = minus.reshape(len(parts.d), -1, lattice.group)
    signs = (minus << np.arange(lattice.group)).sum(axis=2)
    if lattice.shift:
        signs[:] = 0
    points = draw.integers(0, len(lattice.points), signs.shape)
    if lattice.shared_shift:  # one for four points
        points = points % 2048 + 2048 * (points[:, ::4] // 2048).repeat(4, axis=1)
    first, last = lattice.scale_range
    scales = 2 * draw.integers(first // 2, last // 2 + 1, parts.scales.shape) + 1
    parts = replace(parts, codes=points | signs << SIGNS_SHIFT, scales=scales)
    assert scales.min() == first
    assert scales.max() == last
    found = _gguf_values(name, lattice.join(parts))
    np.testing.assert_array_equal(found, lattice.values(parts))


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_lattice_has_its_format_s_shape(name: str) -> None:
    fmt, lattice = get_format(name), CODEBOOKS[name]
    parts = lattice.split(_blocks(name))
    assert lattice.block == fmt.block
    assert parts.scales.shape[1] * lattice.sub == fmt.block
    assert parts.codes.shape[1] * lattice.group == fmt.block
    points, group = load_grid(name).levels.shape
    assert lattice.points.shape == (2 * points if lattice.shift else points, group)
