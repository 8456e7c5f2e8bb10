"""What a search for scales takes: see `quantcli.transforms.scale_search`.

Each thread has a group's Hessian, its factor where feedback follows, and rows of its consumers.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantcli.plan.layer_sizes import ModelSizes
from quantcli.plan.needs import Stage, Work

_MATRICES, _ROWS = 2, 2
"""Copies in float32 of the widest Hessian and of the largest matrix's rows that a thread holds."""
_CANDIDATES = 20
_SHARE = 0.25
"""Of a matrix's rows so many are tried with each candidate."""


def search_stage(sizes: ModelSizes, threads: int, formats: Mapping[str, str]) -> Stage:
    """A search over all groups; ``formats`` are what tensors will be written in, by name."""
    matrices = [one for layer in sizes.layers for one in layer.matrices]
    widest = max((one.columns for one in matrices), default=0)
    rows = max((one.rows * one.columns for one in matrices), default=0)
    memory = threads * 4 * (_MATRICES * widest**2 + _ROWS * rows)
    work = Work()
    for one in matrices:
        if one.name in formats:
            tried = _CANDIDATES * _SHARE * one.elements
            work += Work(
                float32=2.0 * tried * one.columns, encoded={formats[one.name]: tried},
                read=4.0 * one.elements,
            )  # fmt: skip
    return Stage("search for scales", memory, work=work)
