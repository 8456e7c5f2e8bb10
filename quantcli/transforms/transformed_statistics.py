"""Statistics of a transformed model's inputs, computed from the original's.

A tensor that is scaled along its columns meets inputs scaled inversely, one that is rotated
meets rotated inputs; so the statistics of a transformed model follow from the original's, and
nothing needs to be calibrated twice. Largest and mean absolute values do not survive a rotation.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.formats.base import Floats
from quantcli.sources.imatrix import ENOUGH_TOKENS, Importance, shrink
from quantcli.statistics.input_statistics import InputStatistics
from quantcli.transforms.orthogonal import Permutation
from quantcli.transforms.spec import Operation, TransformSpec

Vector = NDArray[np.float64]


class TransformedStatistics:
    """The statistics that ``base`` would hold of the model after ``transform``.

    SourceError for what cannot be computed: absolute values after a rotation, and channels that a
    norm's weight of zero had hidden.
    """

    def __init__(self, base: InputStatistics, transform: TransformSpec) -> None:
        self._base = base
        self._transform = transform

    def count(self, name: str, matrix: int = 0) -> int:
        """Inputs that were seen."""
        return self._base.count(self._origin(name), matrix)

    def hessian(self, name: str, matrix: int = 0) -> Floats:
        """The mean of x x^T."""
        found = self._base.hessian(self._origin(name), matrix)
        operation = self._transform.operations.get(name)
        if operation is None:
            return found
        factors = _inverse(name, operation, matrix)
        if factors is not None:
            found = np.asarray(found * factors[:, None] * factors[None, :], np.float32)
        turn = operation.columns_rotation
        if turn is None:
            return found
        whole = found.astype(np.float64)
        within, rotation = slice(turn.first, turn.last), self._transform.rotations[turn.rotation]
        whole[:, within] = rotation.apply(whole[:, within])
        whole[within] = rotation.apply(np.ascontiguousarray(whole[within].T)).T
        return whole.astype(np.float32)

    def abs_max(self, name: str, matrix: int = 0) -> Floats:
        """The largest |x|."""
        return self._scaled(name, matrix, self._base.abs_max(self._origin(name), matrix))

    def mean_abs(self, name: str, matrix: int = 0) -> Floats:
        """The mean |x|."""
        return self._scaled(name, matrix, self._base.mean_abs(self._origin(name), matrix))

    def _origin(self, name: str) -> str:
        """The tensor whose input was measured; a tied head has no input hook as the embeddings."""
        operation = self._transform.operations.get(name)
        return name if operation is None or operation.source is None else operation.source

    def _scaled(self, name: str, matrix: int, values: Floats) -> Floats:
        operation = self._transform.operations.get(name)
        if operation is None:
            return values
        factors = _inverse(name, operation, matrix)
        if factors is not None:
            values = np.asarray(values * factors, np.float32)
        turn = operation.columns_rotation
        if turn is None:
            return values
        rotation = self._transform.rotations[turn.rotation]
        if not isinstance(rotation, Permutation):
            raise SourceError(
                f"absolute values of the input of {name} are not known after a rotation",
                hint="use awq or smoothquant before rotate, or without it",
            )
        moved = values.copy()
        moved[turn.first : turn.last] = rotation.apply(values[turn.first : turn.last])
        return moved


def _inverse(name: str, operation: Operation, matrix: int) -> Vector | None:
    """What the input is multiplied by, since the columns are divided by it."""
    if operation.columns is None:
        return None
    columns = operation.columns if operation.columns.ndim == 1 else operation.columns[matrix]
    if not columns.all():
        raise SourceError(
            f"the norm before {name} has weights of zero, so what it hides was not measured",
            hint="calibrate the rotated model instead",
        )
    return 1.0 / columns.astype(np.float64)


def transform_importance(
    importance: Importance, transform: TransformSpec, measured: InputStatistics | None = None
) -> Importance:
    """The importance matrix of the model after ``transform``.

    Mean squares follow scales by themselves; a rotation mixes channels, so its need ``measured``
    with the original's Hessians, and SourceError says so where there is none.
    """
    entries = {}
    # What was known of tied embeddings is the head's input, and moves with the head.
    moved = {operation.source for operation in transform.operations.values()}
    for name in (importance.entries.keys() | transform.operations.keys()) - moved:
        operation = transform.operations.get(name, Operation())
        entry = importance.entries.get(operation.source or name)
        if entry is None or operation.values is not None:
            continue
        if operation.columns_rotation is None:
            columns = np.float32(1) if operation.columns is None else operation.columns
            entries[name] = np.asarray(entry / np.square(columns), np.float32)
        elif measured is None:
            raise SourceError(
                f"{importance.path}: an importance matrix alone does not tell that of a rotated "
                "model",
                hint="calibrate with --collect hessian",
            )
        else:
            turned = TransformedStatistics(measured, transform)
            counts = np.array([turned.count(name, m) for m in range(len(entry))], np.float32)
            squares = [turned.hessian(name, m).diagonal() for m in range(len(entry))]
            sums = np.asarray(np.array(squares) * counts[:, None], np.float32)
            entries[name] = shrink(sums, counts, ENOUGH_TOKENS)
    return replace(importance, entries={name: entries[name] for name in sorted(entries)})
