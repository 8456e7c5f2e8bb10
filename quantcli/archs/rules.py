"""The words of a family's table: one rule for one GGUF tensor, pure data.

Names, shapes in named dimensions and row orders can be read in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantcli.pieces import Pointwise

Dims = Mapping[str, int]
"""Sizes by name: "hidden", "vocab", "heads" ..., as the rules' shapes refer to them."""
Values = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Share:
    """Where a rule's tensor lies when the checkpoint fuses several: part ``index`` of ``of``.

    ``source`` has shape (experts, of * rows, columns).
    """

    source: str
    index: int = 0
    of: int = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """One GGUF tensor and the stored tensor behind it; a pattern over layers and experts.

    ``{i}`` in the names is the layer. ``{e}`` in ``source`` is the expert: the experts' matrices
    become one tensor of shape (experts, rows, columns), and ``fused`` is the other layout that
    checkpoints use for it. ``shape`` names dimensions. ``rotary`` names the count of heads whose
    two halves are interleaved, as ggml's pairwise rotation needs (GGML_ROPE_TYPE_NORMAL).
    ``transpose``: stored as (in, out). ``pointwise`` is applied to every value. An ``optional``
    tensor is written if it is there.
    """

    name: str
    source: str
    shape: tuple[str, ...]
    rotary: str | None = None
    transpose: bool = False
    pointwise: Pointwise | None = None
    fused: Share | None = None
    optional: bool = False
