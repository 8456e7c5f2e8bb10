"""Blocks taken apart and put together again, against llama.cpp's own bytes and gguf's decoder."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
from support import rows

from quantcli.formats import get_format, native
from quantcli.formats.lattice import LATTICES, Lattice


def _blocks(name: str, *, weighted: bool) -> np.ndarray:
    fmt = get_format(name)
    x = rows.make("heavy-tailed", 24, 1024)
    weights = rows.make("random", 1, 1024)[0] ** 2 if weighted else None
    return native.encode(fmt, x, weights).reshape(-1, fmt.nbytes)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", LATTICES)
def test_joining_what_was_split_gives_the_same_bytes(name: str, weighted: bool) -> None:
    blocks = _blocks(name, weighted=weighted)
    lattice = LATTICES[name]
    np.testing.assert_array_equal(lattice.join(lattice.split(blocks)), blocks)


def _gguf_values(name: str, blocks: np.ndarray) -> np.ndarray:
    """What gguf's own code decodes; our decoder, tested elsewhere, where it has none."""
    kind = getattr(gguf.GGMLQuantizationType, name, None)
    try:
        return gguf.dequantize(blocks, kind)
    except (NotImplementedError, AttributeError):
        return native.decode(get_format(name), blocks)


@pytest.mark.parametrize("name", LATTICES)
def test_any_codes_decode_to_their_levels(name: str) -> None:
    """Also codes and scales that the encoder would not have chosen."""
    lattice = LATTICES[name]
    parts = lattice.split(_blocks(name, weighted=False))
    draw = np.random.default_rng(7)
    parts = replace(parts, codes=draw.integers(0, len(lattice.levels), parts.codes.shape))
    if lattice.scale_range[0] < lattice.scale_range[1]:
        first, last = lattice.scale_range
        parts = replace(parts, scales=draw.integers(first, last + 1, parts.scales.shape))
    if parts.mins is not None and lattice.min_range is not None:
        first, last = lattice.min_range
        parts = replace(parts, mins=draw.integers(first, last + 1, parts.mins.shape))
    found = _gguf_values(name, lattice.join(parts))
    np.testing.assert_array_equal(found, lattice.values(parts))


@pytest.mark.parametrize("name", LATTICES)
def test_a_lattice_has_its_format_s_block(name: str) -> None:
    lattice: Lattice = LATTICES[name]
    assert lattice.block == get_format(name).block
    assert lattice.block % lattice.sub == 0
