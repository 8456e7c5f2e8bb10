"""What training takes: of a layer (`quantcli.training.tune`), and of the whole model.

Both compute in float32. A layer that is trained holds its weights, their gradients, and for each
code where it began, where it is, two of Adam's means and the best state.
"""

from __future__ import annotations

from collections.abc import Iterable

from quantcli.formats.base import BlockFormat
from quantcli.layerwise.pass_needs import Passes
from quantcli.plan.layer_sizes import LayerSize
from quantcli.plan.needs import Stage, Work
from quantcli.rounding.packed_matrix import has_lattice

_TRAINED, _MOVED = 28, 36
"""Bytes for each weight of a layer, and while values are made of codes, of its largest tensor."""
_BATCH, _TURNS = 4, 15
_END_BATCH, _END_TURNS = 2, 8
_HELD_OUT = 8
_PLANES = 28
"""Bytes for each scale, norm or bias that is trained end to end, in a mapped file."""
_CODE_PLANES = 16
"""Bytes for each weight whose code is trained, in a mapped file."""
_STEP = 24
"""Bytes for each weight of the largest tensor that a step's copies take or leave the allocator."""
_LOGITS = 7
"""Copies of a window's logits in float32, of both models."""


def tune_bytes(passes: Passes, layer: LayerSize) -> int:
    """A layer's training, its weights and a window's gradients."""
    most = max((one.elements for one in layer.matrices), default=0)
    codes = _TRAINED * sum(one.elements for one in layer.matrices)
    return passes.backward_bytes(layer) + codes + _MOVED * most


def tune_work(passes: Passes, layer: LayerSize, steps: int) -> Work:
    """Steps of a few windows there and back, and looks at those held out."""
    judged = (_TURNS + 1) * max(1, passes.windows // _HELD_OUT)
    there = passes.forward_work(layer, 1).products
    moved = 200.0 * sum(one.elements for one in layer.matrices)
    return Work(products=there * (3 * _BATCH * steps + judged), float32=moved * steps)


def code_bytes(packed: Iterable[tuple[int, BlockFormat]]) -> int:
    """Files of codes that are trained, by each tensor's elements and format: planes, rows twice."""
    total = 0
    for elements, fmt in packed:
        if has_lattice(fmt.name):
            total += _CODE_PLANES * elements + 2 * elements // fmt.block * fmt.nbytes
    return total


def end_to_end_stage(passes: Passes, steps: int, factors: int, codes: int = 0) -> Stage:
    """Training of ``factors`` scales, norms and biases, both models' heads at once.

    ``codes`` are the bytes of `code_bytes`, if codes are trained; they are mapped like the rest.
    """
    sizes = passes.sizes
    logits = passes.tokens * sizes.vocabulary
    head = 3 * sizes.head.elements * passes.itemsize + 4 * _LOGITS * logits
    layer = max(
        passes.backward_bytes(layer) + 3 * 4 * max((m.elements for m in layer.matrices), default=0)
        + passes.itemsize * layer.elements
        for layer in sizes.layers
    )  # fmt: skip
    planes = _PLANES * factors + codes
    largest = max(
        sizes.head.elements, *(m.elements for layer in sizes.layers for m in layer.matrices)
    )
    copies = _STEP * largest if codes else 0
    inputs = 4 * (len(sizes.layers) + 1) * _END_BATCH * passes.tokens * sizes.hidden
    judged = max(1, passes.windows // _HELD_OUT)
    there = sum((passes.forward_work(layer, 1).products for layer in sizes.layers), 0.0)
    there += 2 * passes.head_work(1).products
    weights = sum(layer.elements for layer in sizes.layers)
    work = Work(
        products=there * (4 * _END_BATCH * steps + (_END_TURNS + 1) * judged),
        float32=60.0 * weights * (2 * steps + _END_TURNS + 1),
    )
    return Stage("end to end", max(head, layer) + planes + copies, planes + inputs, work=work)
