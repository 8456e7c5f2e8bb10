"""Rotations are orthogonal, spread evenly where a Hadamard matrix exists, and repeatable."""

from __future__ import annotations

import numpy as np
import pytest

from quantcli.transforms.orthogonal import make_rotation

EVEN = [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 64, 72, 96, 192, 512, 576, 640, 896]
"""Sylvester's sizes, both of Paley's, and products; 576, 640 and 896 are 16x36, 32x20, 32x28."""
UNEVEN = [3, 7, 43, 86, 172, 376]


@pytest.mark.parametrize("size", EVEN + UNEVEN)
def test_orthogonal(size: int) -> None:
    matrix = make_rotation(size, 1).matrix()
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-12


@pytest.mark.parametrize("size", EVEN)
def test_every_channel_reaches_every_other_alike(size: int) -> None:
    matrix = make_rotation(size, 1).matrix()
    np.testing.assert_allclose(np.abs(matrix), 1 / np.sqrt(size), rtol=1e-12)


@pytest.mark.parametrize("size", [5120, 11008, 4096])
def test_factors_are_about_the_root_of_the_size(size: int) -> None:
    rotation = make_rotation(size, 0)
    assert len(rotation.left) * len(rotation.right) == size
    assert len(rotation.left) + len(rotation.right) < 6 * np.sqrt(size)


@pytest.mark.parametrize("size", [64, 43])
def test_the_seed_decides(size: int) -> None:
    first, again, other = (make_rotation(size, seed).matrix() for seed in (5, 5, 6))
    assert (first == again).all()
    assert np.abs(first - other).max() > 0.01


def test_signs_never_change_between_versions() -> None:
    """A file that was rotated years ago can be made again."""
    signs = make_rotation(16, 0).signs
    assert "".join("+" if sign > 0 else "-" for sign in signs) == "----+++-++++-+--"


def test_rows_longer_than_the_size_turn_in_groups() -> None:
    rotation = make_rotation(12, 2)
    rows = np.random.default_rng(0).standard_normal((3, 36))
    whole = np.kron(np.eye(3), rotation.matrix())
    np.testing.assert_allclose(rotation.apply(rows), rows @ whole, atol=1e-14)
