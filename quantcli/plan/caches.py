"""The attention modules of a checkpoint that keep keys and values in a cache.

They are found by the GGUF tensors that hold their queries, or queries, keys and values in one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantcli.archs.config import class_name
from quantcli.errors import PlanError
from quantcli.model import Model

_QUERIES = re.compile(r"blk\.(\d+)\.(attn_q|attn_qkv|attn_kv_a_mqa|attn_kv_b)\.weight")
_LATENT = ("attn_kv_a_mqa", "attn_kv_b")
_PROJECTIONS = ("q_proj", "qkv_proj")
"""What the projections are called of attention that compressed-tensors and vLLM know."""


@dataclass(frozen=True, slots=True)
class CacheOwner:
    """An attention module, by its name in the checkpoint, and its ``layer``."""

    module: str
    layer: int


def find_caches(model: Model) -> tuple[CacheOwner, ...]:
    """The modules in the order of layers; PlanError where a cache has no scales of this kind."""
    apart = {tensor.name for tensor in model.mtp_tensors}
    found: dict[int, CacheOwner] = {}
    for tensor in model.tensors:
        match = _QUERIES.fullmatch(tensor.name)
        if match is None or tensor.name in apart or not tensor.pieces:
            continue
        if match[2] in _LATENT:
            raise PlanError(
                f"--kv-cache does not fit {class_name(model.config)}, whose servers keep latent "
                "vectors in the cache where transformers keeps keys and values",
                hint="leave it out; 'vllm serve --kv-cache-dtype fp8' takes scales of one",
            )
        module, _, leaf = tensor.pieces[0].source.removesuffix(".weight").rpartition(".")
        if leaf in _PROJECTIONS:
            layer = int(match[1])
            found[layer] = CacheOwner(module, layer)
    if not found:
        raise PlanError(
            f"--kv-cache finds no attention in {class_name(model.config)} with the projections "
            f"that servers know ({' or '.join(_PROJECTIONS)})",
            hint="leave it out",
        )
    return tuple(found[layer] for layer in sorted(found))
