"""torch on several threads, with results that do not depend on how many.

torch and the libraries behind it divide an operation among their threads, and what a number comes
out as depends on where the cuts are: an expert with five tokens, a matrix of 65 rows, any Cholesky
factor, even SiLU at the edge of a share, where it is not computed eight values at a time. So here
torch itself uses one thread, and the division is ours and fixed: a product is cut into tiles of one
size, a matrix is factored in panels of one width, attention goes by heads, an operation on each
element by a number of rows. How many threads there are only decides how many parts are under way at
once. What is none of these is computed by one thread, which takes little beside the products.

`steady` does this for all that runs inside of it on the CPU, gradients included, whatever code of
transformers it is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

_TILE = 512
"""Rows and columns of a product that one thread computes."""
_PANEL = 512
"""Columns that are factored at once."""
_BATCH = 8
"""Small products that one thread computes together."""
_COPIED = 1 << 23
"""Elements of a tile's columns that are not copied: those of a head's weights, going backwards."""
_LARGE = 1 << 18
"""Elements from which on an operation on each of them is shared."""
_ELEMENTS = 1 << 16
"""Elements of a share, about."""

_aten = torch.ops.aten
_Task = Callable[[], Any]


class _Pool:
    """Threads in which torch and the libraries below it use one thread each."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._executor = ThreadPoolExecutor(
            count, thread_name_prefix="product", initializer=_use_one_thread
        )

    def run(self, tasks: Sequence[_Task]) -> None:
        """Do all tasks; the first error is raised when none is under way."""
        waiting = iter(tasks)
        lock = threading.Lock()
        inference = torch.is_inference_mode_enabled()

        def work() -> None:
            with torch.inference_mode(inference), torch.no_grad():
                while True:
                    with lock:
                        task = next(waiting, None)
                    if task is None:
                        return
                    task()

        workers = [self._executor.submit(work) for _ in range(min(self.count, len(tasks)))]
        for failed in [worker.exception() for worker in workers]:
            if failed is not None:
                raise failed

    def close(self) -> None:
        """Let the threads end."""
        self._executor.shutdown(wait=False)


def _use_one_thread() -> None:
    # A thread takes the common number up when it first asks for it, which must be over before.
    torch.get_num_threads()
    torch.set_num_threads(1)


_pool: _Pool | None = None
_elsewhere = False
_lock = threading.Lock()


def use_threads(count: int, device: str = "cpu") -> None:
    """From now on so many threads share what is done here, and torch itself uses one.

    Where models run on another ``device``, `steady` has nothing to do.
    """
    global _pool, _elsewhere
    _elsewhere = device != "cpu"
    _use_one_thread()
    with _lock:
        if _pool is None or _pool.count != count:
            before, _pool = _pool, _Pool(count)
            if before is not None:
                before.close()


def run_tasks(tasks: Sequence[_Task]) -> None:
    """Do all tasks on the threads of `use_threads`, torch using one thread in each; none of them
    calls this again. The first error is raised when none is under way."""
    with _one_thread():
        _run(tasks)


def _run(tasks: Sequence[_Task]) -> None:
    pool = _pool
    if pool is None or pool.count == 1 or len(tasks) == 1:
        for task in tasks:
            task()
        return
    pool.run(tasks)


def _forget() -> None:
    """In a child of a fork, which has none of the threads."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch uses one thread in the present one."""
    before = torch.get_num_threads()
    if before != 1:
        _use_one_thread()
    try:
        yield
    finally:
        if before != 1:
            torch.set_num_threads(before)


@contextmanager
def steady() -> Iterator[None]:
    """What torch computes inside on the CPU does not depend on the number of threads."""
    if _elsewhere or any(isinstance(mode, _Steady) for mode in _get_current_dispatch_mode_stack()):
        yield
        return
    with _one_thread(), _Steady():
        yield


class _Steady(TorchDispatchMode):
    """Takes, below autograd, the operations whose parts several threads can compute."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Or torch loads all of its compiler, which takes a second, only to keep it away from here.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _COMPOSED:
            # Whole in inference mode, of which products are seen only once it is taken apart.
            with self:
                return func.decompose(*args, **kwargs)
        own = _OWN.get(func)
        if own is not None and args[0].device.type == "cpu" and args[0].is_floating_point():
            return own(*args, **kwargs)
        if not kwargs and _is_large(args) and _is_pointwise(func):
            return _by_rows(func, args)
        return func(*args, **kwargs)


def _is_large(args: Sequence[Any]) -> bool:
    """Whether the first argument is a large block of rows, and no other one is larger."""
    first = args[0] if args else None
    return (
        isinstance(first, torch.Tensor)
        and first.device.type == "cpu"
        and first.numel() >= _LARGE
        and first.is_contiguous()
        and all(
            other.device.type == "cpu"
            and (other.shape == first.shape or other.dim() < 2 or other.numel() == 1)
            for other in args[1:]
            if isinstance(other, torch.Tensor)
        )
        and not any(isinstance(other, (list, tuple)) for other in args)
    )


def _is_pointwise(func: Any) -> bool:
    """Whether it makes one new tensor, each element of those at its place."""
    schema = func._schema
    return torch.Tag.pointwise in func.tags and not schema.is_mutable and len(schema.returns) == 1


def _by_rows(func: Any, args: Sequence[Any]) -> Any:
    """An operation on each element, a fixed number of rows at a time."""
    first = args[0]
    width = first.shape[-1]
    rows = [
        other.reshape(-1, width)
        if isinstance(other, torch.Tensor) and other.shape == first.shape
        else other
        for other in args
    ]
    count = first.numel() // width
    step = max(1, _ELEMENTS // width)

    def part(start: int) -> Any:
        share = (
            other[start : start + step] if isinstance(other, torch.Tensor) and other.dim() == 2
            and len(other) == count else other
            for other in rows
        )  # fmt: skip
        return func(*share)

    begun = part(0)
    out = torch.empty((count, width), dtype=begun.dtype)
    out[:step] = begun

    def rest(start: int) -> None:
        out[start : start + step] = part(start)

    _run([partial(rest, start) for start in range(step, count, step)])
    return out.reshape(first.shape)


def _tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for column in range(0, columns, _TILE):
        for row in range(0, rows, _TILE):
            yield slice(row, row + _TILE), slice(column, column + _TILE)


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a.new_empty((a.shape[0], b.shape[1]))

    def tile(rows: slice, columns: slice) -> None:
        torch.mm(a[rows], b[:, columns], out=out[rows, columns])

    _run([partial(tile, *place) for place in _tiles(*out.shape)])
    return out


def _addmm(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    out = a.new_empty((a.shape[0], b.shape[1]))
    whole = bias.expand(out.shape)

    def tile(rows: slice, columns: slice) -> None:
        torch.addmm(
            whole[rows, columns], a[rows], b[:, columns], beta=beta, alpha=alpha,
            out=out[rows, columns],
        )  # fmt: skip

    _run([partial(tile, *place) for place in _tiles(*out.shape)])
    return out


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a.new_empty((a.shape[0], a.shape[1], b.shape[2]))

    def tile(batch: slice, rows: slice, columns: slice) -> None:
        first = batch.start
        if len(a[batch]) == 1 and b.shape[1] * _TILE >= _COPIED:
            # `bmm` would copy its columns of the matrix; the result is the same.
            out[first, rows, columns] = torch.mm(a[first, rows], b[first, :, columns])
            return
        out[batch, rows, columns] = torch.bmm(a[batch, rows], b[batch, :, columns])

    step = _BATCH if max(out.shape[1:]) <= _TILE else 1
    _run(
        [
            partial(tile, slice(first, first + step), *place)
            for first in range(0, len(out), step)
            for place in _tiles(*out.shape[1:])
        ]
    )
    return out


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any,
    attn_mask: torch.Tensor | None = None, **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of (batch, heads, tokens, size), head by head."""
    heads = query.shape[1]
    if heads != key.shape[1] or (attn_mask is not None and attn_mask.dim() < 4):
        return _FLASH(query, key, value, *rest, attn_mask=attn_mask, **options)  # type: ignore[no-any-return]
    found: list[Any] = [None] * heads

    def attend(head: int) -> None:
        own = slice(head, head + 1)
        mask = attn_mask
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, own]
        found[head] = _FLASH(
            query[:, own], key[:, own], value[:, own], *rest, attn_mask=mask, **options
        )

    _run([partial(attend, head) for head in range(heads)])
    outputs, sums = zip(*found, strict=True)
    # In the order in memory that it has as a whole, which decides about views after it.
    out = torch.cat([one.transpose(1, 2) for one in outputs], 2).transpose(1, 2)
    return out, torch.cat(sums, 1)


def cholesky(values: torch.Tensor) -> torch.Tensor:
    """The lower factor of a positive definite matrix; ``torch.linalg.LinAlgError`` where it is not.

    Panel by panel, each taken off the columns after it before the next (Golub and Van Loan, Matrix
    Computations, 4.2.9); above the diagonal there are zeros.
    """
    with _one_thread():
        return _cholesky(values)


def _cholesky(values: torch.Tensor) -> torch.Tensor:
    count = len(values)
    lower = values.clone(memory_format=torch.contiguous_format)
    failed: list[bool] = []

    def factor(panel: slice) -> None:
        found, info = torch.linalg.cholesky_ex(lower[panel, panel])
        failed.append(bool(info.any()))
        lower[panel, panel] = found

    def solve(rows: slice, panel: slice) -> None:
        lower[rows, panel] = torch.linalg.solve_triangular(
            lower[panel, panel].mT, lower[rows, panel], upper=True, left=False
        )

    def take_off(rows: slice, columns: slice, solved: torch.Tensor, first: int) -> None:
        own, other = (solved[part.start - first : part.stop - first] for part in (rows, columns))
        lower[rows, columns] -= linear(own, other) if linear else own @ other.mT

    linear = linear_product() if values.dtype == torch.float32 else None

    for start in range(0, count, _PANEL):
        panel = slice(start, min(start + _PANEL, count))
        _run([partial(factor, panel)])
        if failed[-1]:
            raise torch.linalg.LinAlgError("not positive definite")
        after = [slice(i, min(i + _TILE, count)) for i in range(panel.stop, count, _TILE)]
        _run([partial(solve, rows, panel) for rows in after])
        solved = lower[panel.stop :, panel].contiguous()
        _run(
            [
                partial(take_off, rows, columns, solved, panel.stop)
                for number, columns in enumerate(after)
                for rows in after[number:]
            ]
        )
    return lower.tril_()


@cache
def linear_product() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """oneDNN's product of inputs and the weights of a linear layer, where torch has it."""
    found: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if found is None or not torch.backends.mkldnn.is_available():
        return None

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return found(a, b, None, "none", [], "")

    ones = torch.ones(2, 2)
    try:
        multiply(ones, ones)
    except (RuntimeError, TypeError):
        return None
    return multiply


_FLASH = _aten._scaled_dot_product_flash_attention_for_cpu.default
_OWN: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.bmm.default: _bmm,
    _FLASH: _attend,
}
_COMPOSED = {
    _aten.linear.default,
    _aten.matmul.default,
    _aten.einsum.default,
    _aten.scaled_dot_product_attention.default,
}
