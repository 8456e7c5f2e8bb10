"""What it takes to have a model write windows: see `quantcli.layerwise.own_samples`."""

from __future__ import annotations

from quantcli.layerwise.own_samples import BATCH
from quantcli.layerwise.pass_needs import Passes
from quantcli.plan.needs import SAMPLES, Stage, Work

_KEYS = ("attn_k", "attn_v", "attn_qkv")
"""Parts of the names of matrices whose outputs are kept for the tokens that follow."""
_COPIES = 2
"""Of a layer's keys and values, when those of a token are added."""


def samples_stage(passes: Passes, count: int) -> Stage:
    """All weights in memory, keys and values of a batch, and the logits of its next tokens."""
    sizes, batch = passes.sizes, min(count, BATCH)
    weights = sum(layer.elements for layer in sizes.layers) + sizes.outside
    weights += sizes.embedding.elements + (0 if sizes.tied else sizes.head.elements)
    kept = [
        sum(m.rows for m in layer.matrices if any(key in m.name for key in _KEYS))
        for layer in sizes.layers
    ]
    values = batch * passes.tokens * (sum(kept) + _COPIES * max(kept))
    logits = 3 * 8 * batch * sizes.vocabulary
    work = sum((passes.forward_work(layer, count) for layer in sizes.layers), Work())
    memory = passes.itemsize * (weights + values) + logits
    return Stage(SAMPLES, memory, work=work + passes.head_work(count))
