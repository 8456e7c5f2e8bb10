"""A piece's two directions: both against plain NumPy, slab by slab, and there and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantcli.checkpoint_view import CheckpointView, find_uses, read_back
from quantcli.model import Model
from quantcli.pieces import (
    Add,
    Finite,
    Multiply,
    NegativeExp,
    Order,
    Piece,
    Pointwise,
    Softplus,
    read_scattered,
)
from quantcli.types import OutputTensor, TensorInfo

E, H, D, R, C = 3, 2, 4, 6, 8


def _numbers(*shape: int) -> NDArray[np.float32]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def _pieces(columns: int, *orders: Order) -> tuple[Piece, ...]:
    """Pieces of one stored tensor "a" whose rows have ``columns`` elements."""
    sizes = [order.strided(np.zeros(order.view)).size for order in orders]
    return tuple(
        Piece("a", size // columns, order=order) for size, order in zip(sizes, orders, strict=True)
    )


def _heads(part: int, of: int) -> Order:
    """One of ``of`` projections that a matrix interleaves per head."""
    return Order((H, of, D, C), (0, 1, 2, 3), C, ((1, part, part + 1),))


STACK = _numbers(E, R, C)
CASES: dict[str, tuple[NDArray[np.float32], tuple[Piece, ...], NDArray[np.float32]]] = {
    "rows as they are": (_numbers(R, C), (Piece("a", R),), _numbers(R, C)),
    "two parts of one tensor": (
        _numbers(R, C),
        (Piece("a", 2), Piece("a", R - 2, start=2)),
        _numbers(R, C),
    ),
    "halves of heads interleaved": (
        _numbers(H * D, C),
        _pieces(C, Order((H, 2, D // 2, C), (0, 2, 1, 3), C)),
        _numbers(H, 2, D // 2, C).swapaxes(1, 2).reshape(H * D, C),
    ),
    "a vector's": (
        _numbers(H * D),
        (Piece("a", 1, order=Order((H, 2, D // 2), (0, 2, 1), H * D)),),
        _numbers(H, 2, D // 2).swapaxes(1, 2).reshape(1, H * D),
    ),
    "heads regrouped": (
        _numbers(H * E * D, C),
        _pieces(C, Order((H, E, D, C), (1, 0, 2, 3), C)),
        _numbers(H, E, D, C).swapaxes(0, 1).reshape(-1, C),
    ),
    "columns regrouped": (
        _numbers(R, H * E),
        (Piece("a", R, order=Order((R, H, E), (0, 2, 1), H * E)),),
        _numbers(R, H, E).swapaxes(1, 2).reshape(R, H * E),
    ),
    "transposed": (_numbers(R, C), _pieces(R, Order((R, C), (1, 0), C)), _numbers(R, C).T),
    "q, k and v fused per head": (
        _numbers(H * 3 * D, C),
        _pieces(C, _heads(0, 3), _heads(1, 3), _heads(2, 3)),
        _numbers(H, 3, D, C).swapaxes(0, 1).reshape(-1, C),
    ),
    "every second row first": (
        _numbers(2 * R, C),
        _pieces(C, *(Order((R, 2, C), (0, 1, 2), C, ((1, part, part + 1),)) for part in (0, 1))),
        np.concatenate([_numbers(2 * R, C)[::2], _numbers(2 * R, C)[1::2]]),
    ),
    "a stack's matrices transposed": (
        STACK,
        _pieces(R, Order((E, R, C), (0, 2, 1), C)),
        STACK.swapaxes(1, 2).reshape(E * C, R),
    ),
    "each matrix of a stack transposed": (
        STACK,
        tuple(Piece("a", C, start=i * R, order=Order((R, C), (1, 0), C)) for i in range(E)),
        STACK.swapaxes(1, 2).reshape(E * C, R),
    ),
    "interleaved columns of a transposed stack": (
        STACK,
        _pieces(
            R,
            *(Order((E, R, C // 2, 2), (0, 2, 1, 3), C, ((3, i, i + 1),)) for i in (0, 1)),
        ),
        np.concatenate([STACK[:, :, i::2].swapaxes(1, 2).reshape(-1, R) for i in (0, 1)]),
    ),
    "slices of a stack": (
        STACK,
        (Piece("a", R, start=2 * R), Piece("a", R, start=0), Piece("a", R, start=R)),
        STACK[[2, 0, 1]].reshape(-1, C),
    ),
    "a middle axis squeezed": (_numbers(R, 1, C), (Piece("a", R),), _numbers(R, C)),
    "a vector as a column": (
        _numbers(R),
        (Piece("a", R, order=Order((R,), (0,), R)),),
        _numbers(R, 1),
    ),
    "a norm's 1 added": (_numbers(C), (Piece("a", 1, pointwise=Add(1.0)),), _numbers(1, C) + 1),
    "a decay": (
        _numbers(R, C) / 9,
        (Piece("a", R, pointwise=NegativeExp()),),
        -np.exp(_numbers(R, C) / 9),
    ),
}
"""What a checkpoint stores, the pieces, and the output rows."""


class _Store:
    """Stored tensors in memory, which count what is read."""

    def __init__(self, **arrays: NDArray[np.float32]) -> None:
        self.arrays = arrays
        self.tensors = {
            name: TensorInfo(name, a.shape, "F32", a.nbytes, Path("x"))
            for name, a in arrays.items()
        }

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        array = self.arrays[name]
        rows = array.reshape(-1, array.shape[-1])
        assert 0 <= start < stop <= len(rows)
        return rows[start:stop].copy()

    def read_columns(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        array = self.arrays[name]
        assert array.ndim == 2
        return np.ascontiguousarray(array[:, start:stop].T)

    def close(self) -> None:
        pass


def _model(stored: NDArray[np.float32], pieces: Sequence[Piece], columns: int) -> Model:
    shape = (sum(piece.rows for piece in pieces), columns)
    tensor = OutputTensor("out", shape, "F32", tuple(pieces))
    return Model("m", Path("m"), "llama", {}, (tensor,), _Store(a=stored), from_gguf=False)


@pytest.mark.parametrize("name", CASES)
def test_gather_is_what_numpy_makes(name: str) -> None:
    stored, pieces, wanted = CASES[name]
    for kind in (np.asarray, torch.from_numpy):
        found = [np.asarray(piece.gather(kind(stored.copy()))) for piece in pieces]
        np.testing.assert_allclose(np.concatenate(found), wanted, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_scatter_is_the_way_back(name: str) -> None:
    stored, pieces, wanted = CASES[name]
    for kind in (np.asarray, torch.from_numpy):
        again = np.full(stored.shape, np.nan, np.float32)
        first = 0
        for piece in pieces:
            piece.scatter(kind(again), kind(wanted[first : first + piece.rows].copy()))
            first += piece.rows
        np.testing.assert_allclose(again, stored, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_slabs_are_the_whole_in_parts(name: str, data: st.DataObject) -> None:
    stored, pieces, wanted = CASES[name]
    model = _model(stored, pieces, wanted.shape[1])
    start, stop = _range(data, len(wanted))
    np.testing.assert_allclose(
        model.read_rows(model.tensors[0], start, stop), wanted[start:stop], rtol=1e-6
    )


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_stored_slabs_come_back(name: str, data: st.DataObject) -> None:
    stored, pieces, wanted = CASES[name]
    model = _model(stored, pieces, wanted.shape[1])
    view = CheckpointView(
        model.store.tensors, find_uses(model.tensors), model.read_rows, lambda _, rows: rows
    )
    rows = stored.reshape(-1, stored.shape[-1])
    start, stop = _range(data, len(rows))
    np.testing.assert_allclose(
        view.read_rows("a", start, stop), rows[start:stop], rtol=1e-6, atol=1e-6
    )
    if stored.ndim > 1:
        matrices = stored.reshape(-1, *stored.shape[-2:])
        number = data.draw(st.integers(0, len(matrices) - 1))
        start, stop = _range(data, stored.shape[-1])
        offset = number * stored.shape[-1]
        np.testing.assert_allclose(
            view.read_columns("a", offset + start, offset + stop),
            matrices[number][:, start:stop].T,
            rtol=1e-6,
            atol=1e-6,
        )


def _range(data: st.DataObject, rows: int) -> tuple[int, int]:
    start = data.draw(st.integers(0, rows - 1))
    return start, data.draw(st.integers(start + 1, rows))


@pytest.mark.parametrize("name", CASES)
def test_every_element_knows_where_it_comes_from(name: str) -> None:
    stored, pieces, wanted = CASES[name]
    model = _model(stored, pieces, wanted.shape[1])
    rows = stored.reshape(-1, stored.shape[-1])
    for row, column in np.ndindex(wanted.shape):
        _, stored_row, stored_column = model.origin(model.tensors[0], row, column)
        piece = pieces[0]
        found = piece.apply(np.array([[rows[stored_row, stored_column]]]))
        np.testing.assert_allclose(found, wanted[row, column], rtol=1e-6)


@st.composite
def _orders(draw: st.DrawFn) -> Order:
    """Any view of a matrix, cut and reordered."""
    view = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    axes = tuple(draw(st.permutations(range(len(view)))))
    cut = []
    for axis, size in enumerate(view):
        if draw(st.booleans()):
            start = draw(st.integers(0, size - 1))
            cut.append((axis, start, draw(st.integers(start + 1, size))))
    wide = draw(st.integers(0, len(view) - 1))
    return Order(view, axes, int(np.prod(view[wide:])), tuple(cut))


@settings(deadline=None)
@given(_orders(), st.data())
def test_any_order_goes_there_and_back(order: Order, data: st.DataObject) -> None:
    stored = _numbers(int(np.prod(order.view)) // order.columns, order.columns)
    wanted = order.strided(stored)
    axes = data.draw(st.integers(0, wanted.ndim))
    wanted = wanted.reshape(int(np.prod(wanted.shape[:axes])), -1)
    piece = Piece("a", len(wanted), order=order)
    model = _model(stored, (piece,), wanted.shape[1])
    start, stop = _range(data, len(wanted))
    # Whole rows and transposed matrices make rows of one length only.
    assume(not order.keeps_rows or wanted.shape[1] == order.columns)
    assume(not order.transposes or len(wanted) == order.columns)
    np.testing.assert_array_equal(
        model.read_rows(model.tensors[0], start, stop), wanted[start:stop]
    )
    again = np.full_like(stored, -1)
    piece.scatter(again, wanted)
    held = again >= 0
    assert held.sum() == wanted.size
    np.testing.assert_array_equal(again[held], stored[held])
    start, stop = _range(data, len(stored))
    if held[start:stop].all():
        found = read_back(find_uses(model.tensors)["a"], start, stop, model.read_rows)
        np.testing.assert_array_equal(found, stored[start:stop])


@settings(deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=8))
def test_pointwise_functions_are_undone(values: list[float]) -> None:
    array = np.array([values], np.float32)
    for operation, bound in (
        (Add(1.0), 1e-5),
        (NegativeExp(), 1e-5),
        (Multiply(0.3), 1e-5),
        (Softplus(), 1e-4),
    ):
        np.testing.assert_allclose(operation.undo(operation.apply(array)), array, atol=bound)
        twin = operation.apply(torch.from_numpy(array))
        np.testing.assert_allclose(twin.numpy(), operation.apply(array), rtol=1e-6)


@pytest.mark.parametrize("make", [partial(np.array, dtype=np.float32), torch.tensor])
def test_limits_that_limit_nothing_are_the_largest_numbers(make: Callable[..., Any]) -> None:
    stored = make([[np.inf, -np.inf, 2.0, -0.0]])
    written = np.asarray(Finite().apply(stored))
    largest = np.finfo(np.float32).max
    assert written.tolist() == [[largest, -largest, 2.0, 0.0]]
    assert np.asarray(Finite().undo(Finite().apply(stored))).tolist() == [[np.inf, -np.inf, 2, 0]]


def test_packed_rows_go_back_where_rows_stay_whole() -> None:
    order = Order((H, 2, D // 2, C), (0, 2, 1, 3), C)
    tensor = OutputTensor("out", (H * D, C), "Q8_0", (Piece("a", H * D, order=order),))
    packed = np.arange(H * D * 3, dtype=np.uint8).reshape(H * D, 3)
    found = read_back(
        find_uses([tensor])["a"], 1, 6, lambda tensor, start, stop: packed[start:stop]
    )
    again = np.argsort(tensor.pieces[0].source_rows(0, H * D))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, packed[again][1:6])


def test_pieces_of_several_dtypes_meet_in_float32() -> None:
    halves = [OutputTensor(str(i), (2, C), "F32", (Piece("a", 2, start=2 * i),)) for i in (0, 1)]

    def read(tensor: OutputTensor, start: int, stop: int) -> NDArray[np.generic]:
        kind = np.float16 if tensor.name == "0" else np.float32
        return np.full((stop - start, C), 1 / 3, kind)

    found = read_back(find_uses(halves)["a"], 0, 4, read)
    assert found.dtype == np.float32
    assert found[0, 0] == np.float32(np.float16(1 / 3))
    assert found[3, 0] == np.float32(1 / 3)
    with pytest.raises(ValueError, match="no output tensor holds rows 4 to 5"):
        read_back(find_uses(halves)["a"], 4, 5, read)


def test_rows_made_of_parts_of_rows_have_no_row_numbers() -> None:
    piece = Piece("a", 4, order=Order((2, 3, 2), (0, 2, 1), 2))
    assert not piece.makes_outputs
    with pytest.raises(ValueError, match="takes stored rows apart"):
        piece.source_rows(0, 4)
    assert all(
        one.makes_outputs for case in ("transposed", "rows as they are") for one in CASES[case][1]
    )


def test_gradients_pass_constants_only() -> None:
    gradient = _numbers(1, C)
    found = Piece("a", 1, pointwise=Add(1.0)).gather_gradient(gradient)
    np.testing.assert_array_equal(found, gradient)
    assert not Piece("a", 1, pointwise=NegativeExp()).passes_gradients
    with pytest.raises(ValueError, match="NegativeExp"):
        Piece("a", 1, pointwise=NegativeExp()).gather_gradient(gradient)


def test_far_rows_are_read_in_runs() -> None:
    reads = []

    def read(start: int, stop: int) -> NDArray[np.int64]:
        reads.append((start, stop))
        return np.arange(start, stop).reshape(-1, 1)

    wanted = np.array([0, 1, 90, 91, 5])
    np.testing.assert_array_equal(read_scattered(read, wanted)[:, 0], wanted)
    assert reads == [(0, 2), (90, 92), (5, 6)]
    reads.clear()
    np.testing.assert_array_equal(read_scattered(read, np.array([3, 1]))[:, 0], [3, 1])
    assert reads == [(1, 4)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("function", [NegativeExp(), Multiply(0.7), Multiply(-5.5)], ids=str)
def test_sixteen_bits_come_back_exactly(function: Pointwise, dtype: str) -> None:
    drawn = np.random.default_rng(0).normal(0, 2, 5000)
    stored = drawn.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float32)
    np.testing.assert_array_equal(function.undo(function.apply(stored)), stored)
