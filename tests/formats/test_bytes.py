"""The kernels' bytes are llama.cpp's, for every format, instruction set, kind of row and weight."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from support import ggml, rows

from quantcli import _native
from quantcli.formats import BlockFormat, get_format, native


@cache
def expected(name: str, kind: str, weighing: str, nrows: int, columns: int) -> np.ndarray:
    fmt = get_format(name)
    x = rows.survivable(fmt, rows.make(kind, nrows, columns))
    return ggml.quantize(fmt.type_id, x, rows.importance(weighing, columns))


def encode(
    fmt: BlockFormat, x: np.ndarray, importance: np.ndarray | None, stored: int = 0
) -> np.ndarray:
    """The kernel's bytes, infinite scales included."""
    packed = np.zeros((len(x), fmt.row_bytes(x.shape[1])), np.uint8)
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    bad = _native.encode(fmt.type_id, stored, flat, *x.shape, packed.reshape(-1), importance)
    assert bad == -1
    return packed


def test_every_format_has_a_kernel(fmt: BlockFormat, isa: str) -> None:
    assert native.kernel_id(fmt) == fmt.type_id


@pytest.mark.parametrize("weighing", rows.IMPORTANCES)
@pytest.mark.parametrize("kind", rows.KINDS)
def test_bytes_equal_llama_cpp(fmt: BlockFormat, isa: str, kind: str, weighing: str) -> None:
    nrows, columns = 5, 3 * max(fmt.block, 32)
    if fmt.needs_importance and weighing == "no importance":
        with pytest.raises(ValueError, match=f"{fmt.name} is not encoded without importance"):
            native.encode(fmt, rows.make(kind, nrows, columns))
        return
    x = rows.survivable(fmt, rows.make(kind, nrows, columns))
    got = encode(fmt, x, rows.importance(weighing, columns))
    np.testing.assert_array_equal(got, expected(fmt.name, kind, weighing, nrows, columns))


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("nrows", "blocks"), [(1, 1), (1, 37), (3, 5), (18, 1), (19, 2), (33, 1)])
def test_every_tail_of_lanes(
    fmt: BlockFormat, isa: str, nrows: int, blocks: int, weighed: bool
) -> None:
    columns = blocks * fmt.block
    weighing = "spread" if weighed or fmt.needs_importance else "no importance"
    got = encode(fmt, rows.make("random", nrows, columns), rows.importance(weighing, columns))
    np.testing.assert_array_equal(got, expected(fmt.name, "random", weighing, nrows, columns))


@pytest.mark.slow
def test_many_rows_pass_through_the_scratch_in_turns(fmt: BlockFormat, isa: str) -> None:
    nrows, columns = 50, 8192 if fmt.block == 1 else 64 * fmt.block
    x = rows.make("random", nrows, columns).astype(np.float16)
    importance = rows.needed(fmt, columns)
    got = encode(fmt, x, importance, stored=1)
    reference = ggml.quantize(fmt.type_id, x.astype(np.float32), importance)
    np.testing.assert_array_equal(got, reference)


@pytest.mark.slow
@pytest.mark.parametrize("weighing", ["no importance", "spread", "extreme"])
def test_a_quarter_million_weights_of_each_kind(fmt: BlockFormat, isa: str, weighing: str) -> None:
    if fmt.needs_importance and weighing == "no importance":
        weighing = "half zero"
    for kind in rows.KINDS:
        x = rows.survivable(fmt, rows.make(kind, 64, 4096))
        got = encode(fmt, x, rows.importance(weighing, 4096))
        want = expected(fmt.name, kind, weighing, 64, 4096)
        np.testing.assert_array_equal(got, want, err_msg=kind)
