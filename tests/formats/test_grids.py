"""Codebook grids: gguf's tables reach the kernels, and nothing runs without them."""

from __future__ import annotations

import subprocess
import sys

import gguf
import numpy as np
import pytest
from support import rows

from quantcli import _native
from quantcli.formats import FORMATS, get_format, native
from quantcli.formats.grids import has_grid, load_grid

TABLES = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
CODED = [name for name in FORMATS if has_grid(name)]


@pytest.mark.parametrize("name", TABLES)
def test_points_are_those_that_gguf_decodes_to(name: str) -> None:
    grid = load_grid(name)
    owner = getattr(gguf.quants, "IQ1_S" if name == "IQ1_M" else name)
    np.testing.assert_array_equal(grid.points, owner.grid.reshape(owner.grid_shape))
    assert len(np.unique(grid.levels, axis=0)) == len(grid.levels)


@pytest.mark.parametrize("name", TABLES)
def test_the_index_finds_every_point_and_nothing_else(name: str) -> None:
    grid = load_grid(name)
    found = grid.index[grid.codes(grid.levels)]
    np.testing.assert_array_equal(found, np.arange(len(grid.levels)))
    assert (grid.index >= 0).sum() == len(grid.levels)


@pytest.mark.parametrize("name", ["IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_neighbours_are_the_nearest_shells_in_order(name: str) -> None:
    grid = load_grid(name)
    rng = np.random.default_rng(5)
    for levels in rng.integers(0, len(grid.values), (50, grid.levels.shape[1])):
        distance = ((grid.levels.astype(int) - levels) ** 2).sum(axis=1)
        limit = sorted(set(distance.tolist()))[grid.shells - 1]
        want = sorted((d, i) for i, d in enumerate(distance.tolist()) if d <= limit)
        near = grid.near[grid.codes(levels[None])[0]]
        np.testing.assert_array_equal(near[: len(want)], [i for _, i in want])
        assert (near[len(want) :] == near[0]).all()


@pytest.mark.parametrize("name", TABLES)
def test_the_kernels_take_gguf_s_grid_and_no_other(name: str) -> None:
    grid = load_grid(name)
    type_id = int(gguf.GGMLQuantizationType[name])
    _native.set_grid(type_id, grid.levels, grid.values)
    assert _native.is_ready(type_id)
    for levels, values in (
        (grid.levels[1:], grid.values),
        (np.ascontiguousarray(grid.levels[:, 1:]), grid.values),
        (grid.levels, grid.values[1:]),
        (grid.levels + np.uint8(1), grid.values),
        (grid.levels[:0], grid.values),
    ):
        with pytest.raises(ValueError, match=f"no codebook grid of type {type_id}"):
            _native.set_grid(type_id, levels, values)


def test_a_type_without_a_codebook_takes_no_grid() -> None:
    grid = load_grid("IQ3_S")
    assert _native.is_ready(2)
    with pytest.raises(ValueError, match="no codebook grid of type 2"):
        _native.set_grid(2, grid.levels, grid.values)


@pytest.mark.parametrize("name", CODED)
def test_nothing_runs_without_its_grid(name: str) -> None:
    fmt = get_format(name)
    calls = (
        f"encode({fmt.type_id}, 0, bytes(1024), 1, 256, bytearray({fmt.nbytes}))",
        f"decode({fmt.type_id}, bytes({fmt.nbytes}), memoryview(bytearray(1024)).cast('f'))",
    )
    for call in calls:
        done = subprocess.run(
            [sys.executable, "-c", f"from quantcli import _native; _native.{call}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"ValueError: the codebook grid of type {fmt.type_id} is not set" in done.stderr


@pytest.mark.parametrize("name", CODED)
def test_what_makes_llama_cpp_abort_is_refused(name: str, isa: str) -> None:
    """Distances beyond float32: its search finds no point at all, and the process ends."""
    fmt = get_format(name)
    x = rows.make("random", 3, 2 * fmt.block)
    x[1, 32:64] *= np.float32(5e3)  # of many infinite weights some formats abort,
    x[1, fmt.block + 40] = 100  # others of a single one
    importance = np.full(2 * fmt.block, 3e37, np.float32)
    with pytest.raises(native.UnencodableError, match=f"a float16 scale of {name}") as caught:
        native.encode(fmt, x, importance)
    assert caught.value.row == 1
