"""What each type would cost each tensor by an importance matrix alone, without running the model.

A tensor costs the squared error of its outputs as a share of their squares, so every matrix counts
alike. It says nothing of how much a matrix's outputs matter to predictions (that is what
`quantcli.run.type_costs` measures); but to first order a model's loss rises with the sum of these
shares over its layers (the linearity theorem of HIGGS, arXiv:2411.17525).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantcli.events import Events
from quantcli.model import Model
from quantcli.plan.allocate import Costs
from quantcli.run.allocation_targets import Candidates
from quantcli.run.sample_rows import matrix_count, sample_rows
from quantcli.sources.imatrix import Importance
from quantcli.types import OutputTensor, Progress
from quantcli.workers import Workers, workers


def measure_importance_costs(
    model: Model, importance: Importance, candidates: Candidates, threads: int
) -> Events[Costs]:
    """For each tensor and candidate the outputs' squared error over their squares.

    Tensors that the matrix has no weights for have no entry.
    """
    tensors = [tensor for tensor in model.tensors if tensor.name in candidates]
    whole = sum(tensor.elements for tensor in tensors)
    done, found = 0, {}
    with workers(threads) as pool:
        for tensor in tensors:
            weights = importance.weights(tensor.name, matrix_count(tensor), tensor.columns)
            if weights is not None:
                found[tensor.name] = _shares(model, tensor, weights, candidates, pool)
            done += tensor.elements
            yield Progress(done, whole, "costs")
    return found


def _shares(
    model: Model, tensor: OutputTensor, weights: NDArray[np.float32], candidates: Candidates,
    pool: Workers,
) -> dict[str, float]:  # fmt: skip
    count = matrix_count(tensor)
    height = tensor.rows // count
    errors, power = dict.fromkeys(candidates[tensor.name], 0.0), 0.0
    alike = np.ones(height)
    for matrix in range(count):
        importance = np.ascontiguousarray(weights[matrix % len(weights)])
        columns = importance.astype(np.float64)
        for start, stop in sample_rows(alike, tensor.columns * count):
            first = matrix * height
            rows = model.read_floats(tensor, first + start, first + stop)
            power += float((np.square(rows) @ columns).sum())
            for kind, codec in candidates[tensor.name].items():
                lost = rows - codec.decode(codec.encode(rows, importance, pool))
                errors[kind] += float((np.square(lost) @ columns).sum())
    return {kind: error / power if power > 0 else 0.0 for kind, error in errors.items()}
