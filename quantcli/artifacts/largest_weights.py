"""The largest magnitudes of matrices, for a scale of the whole matrix (NVFP4, FP8 by tensor).

Matrices that servers run as one get one such scale, so the largest of all counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from threading import Lock

import numpy as np

from quantcli.formats import native
from quantcli.model import Model
from quantcli.plan.fused import fused_with
from quantcli.types import Matrix, OutputTensor, TensorStore

_SLAB = 4 << 20
_FUSED = (
    ("attn_q", "attn_k", "attn_v"),
    ("ffn_gate", "ffn_up"),
    ("ffn_gate_exps", "ffn_up_exps"),
    ("ffn_gate_shexp", "ffn_up_shexp"),
    ("attn_q_a", "attn_kv_a_mqa"),
    ("attn_qkv", "attn_gate"),
)
"""GGUF's names of what servers run as one."""


class LargestWeights:
    """The largest magnitudes of a folder's matrices with those that each is run with."""

    def __init__(self, store: TensorStore, matrices: Sequence[Matrix]) -> None:
        self._store = store
        self._by_module = {matrix.module: matrix for matrix in matrices}
        self._found: dict[tuple[str, ...], float] = {}
        self._lock = Lock()

    def __call__(self, matrix: Matrix) -> float:
        """That of a matrix; it is read once."""
        modules = tuple(name for name in fused_with(matrix.module) if name in self._by_module)
        with self._lock:
            if modules not in self._found:
                parts = [self._by_module[name] for name in modules] or [matrix]
                self._found[modules] = max(largest_in(self._store, part) for part in parts)
            return self._found[modules]


def largest_in(store: TensorStore, matrix: Matrix) -> float:
    """The largest magnitude in a stored matrix; NaN where a weight is none."""
    last, step = matrix.first + matrix.rows, max(1, _SLAB // (4 * matrix.columns))
    return _largest(
        native.to_float32(store.read_rows(matrix.source, start, min(start + step, last)))
        for start in range(matrix.first, last, step)
    )


def largest_weight(model: Model, name: str) -> float:
    """The largest magnitude in a GGUF tensor and in those that are run with it."""
    block, _, leaf = name.removesuffix(".weight").rpartition(".")
    parts = next((parts for parts in _FUSED if leaf in parts), (leaf,))
    names = {f"{block}.{part}.weight" if block else f"{part}.weight" for part in parts}
    return max(largest_in_tensor(model, t) for t in model.tensors if t.name in names)


def largest_in_tensor(model: Model, tensor: OutputTensor) -> float:
    """The largest magnitude in a GGUF tensor; NaN where a weight is none."""
    step = max(1, _SLAB // (4 * tensor.columns))
    return _largest(
        model.read_floats(tensor, start, min(start + step, tensor.rows))
        for start in range(0, tensor.rows, step)
    )


def _largest(slabs: Iterable[np.ndarray]) -> float:
    return max(float(np.abs(rows).max(initial=0)) for rows in slabs)
