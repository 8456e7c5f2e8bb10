"""The buffer for what a graph computes with, as large as its widest moment.

llama.cpp reserves it once, for a full batch (``n_ubatch`` tokens) behind a full context, and
ggml-alloc reuses memory as soon as a result was read. So the size is the most that is alive at one
moment, and three moments compete: the logits of a whole batch, a feed-forward part, and attention,
which without flash attention holds a score for every head, token and cell of the cache. What is
alive beside the large results was read off llama.cpp's own figures for 25 published models
(``scripts/check-fit``); it is a few activations wide.

Source: ``graph_reserve`` and ``sched_reserve`` in src/llama-context.cpp, src/llama-graph.cpp,
ggml/src/ggml-alloc.c.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantcli.fit.cache import CacheShape
from quantcli.fit.keys import read_keys
from quantcli.types import MetaValue, OutputTensor

UBATCH = 512
"""llama.cpp's ``--ubatch-size``."""

_FORWARD = re.compile(
    r"blk\.(?P<block>\d+)\.ffn_(?P<part>up|gate|gate_up|down)(?P<experts>_exps)?\.weight"
)
_RESIDUALS = 4
"""Activations as wide as the model that are alive in a feed-forward part."""


@dataclass(frozen=True)
class GraphShape:
    """Widths of what one token is in a graph, in numbers.

    ``forward`` is what a feed-forward part has alive over all experts that a token passes through,
    ``attended`` the width of the queries, and ``latent`` that of those which latent attention
    compares with the cache, with what it reads from there.
    """

    hidden: int
    vocabulary: int
    forward: int
    heads: int
    attended: int
    key_values: int
    latent: int
    recurrent: int

    def buffer_bytes(
        self, cache: CacheShape, context: int, *, ubatch: int = UBATCH, flash: bool = True
    ) -> int:
        """Bytes of the compute buffer."""
        tokens = min(ubatch, context)
        cells = [
            cache.cells(context, ubatch, windowed=kind)
            for kind in {layer.windowed for layer in cache.layers if layer.keys}
        ]
        # Of each kind of cache a mask, in float16 for flash attention. An indexer scores each cell,
        # and what it picks is a mask once more, both in float32.
        indexed = any(layer.indexer for layer in cache.layers)
        masks = (8 if indexed else 2 if flash else 4) * sum(cells)
        logits = 4 * (self.vocabulary + 3 * self.hidden)
        forward = masks + 4 * (self.forward + _RESIDUALS * self.hidden)
        scores = 0 if flash else self.heads * max(cells, default=0)
        queries = self.latent or 3 * self.hidden + 2 * self.attended + self.key_values
        attention = masks + 4 * (scores + queries)
        recurrent = masks + 4 * (self.recurrent + _RESIDUALS * self.hidden)
        return tokens * max(logits, forward, attention, recurrent)


def read_graph(metadata: Mapping[str, MetaValue], tensors: Sequence[OutputTensor]) -> GraphShape:
    """The widths of the model with these key-values and tensors."""
    keys = read_keys(metadata, tensors)
    heads = max(keys.by_layer("attention.head_count"), default=0)
    hidden = keys.number("embedding_length")
    usual = hidden // heads if heads else 0
    size = keys.number("attention.key_length", usual)
    key_heads = max(keys.by_layer("attention.head_count_kv", heads), default=0)
    used = keys.by_layer("expert_used_count") if keys.number("expert_count") else []
    forward = max(_forward_widths(tensors, max(used, default=0)), default=0)
    latent = keys.number("attention.kv_lora_rank") if keys.number("attention.key_length_mla") else 0
    vocabulary = next((t.rows for t in tensors if t.name == "token_embd.weight"), 0)
    return GraphShape(
        hidden,
        vocabulary,
        forward,
        heads,
        heads * size,
        2 * key_heads * size,
        # The queries before and after they meet the rotated part, and what they read.
        heads * (2 * latent + size) + hidden if latent else 0,
        2 * keys.number("ssm.inner_size") + 2 * keys.number("ssm.state_size"),
    )


def _forward_widths(tensors: Sequence[OutputTensor], used: int) -> Iterator[int]:
    """Of each feed-forward part what is alive: all that its inputs become, and their product."""
    opened: dict[tuple[str, str], int] = defaultdict(int)
    inner: dict[tuple[str, str], int] = {}
    for tensor in tensors:
        found = _FORWARD.fullmatch(tensor.name)
        if found is None:
            continue
        place = found["block"], found["experts"] or ""
        times = used if found["experts"] else 1
        if found["part"] == "down":
            inner[place] = times * tensor.columns
        else:
            opened[place] += times * (tensor.shape[-2] if len(tensor.shape) > 1 else 1)
    for place, width in opened.items():
        product = inner.get(place, 0)
        # An activation without a gate overwrites its input.
        yield width + (product if width > product else 0)
