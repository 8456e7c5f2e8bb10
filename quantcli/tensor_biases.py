"""Where llama.cpp adds a bias beside a matrix that had none, by architecture.

``blk.0.ffn_up.bias`` is loaded wherever a file has it, but only some graphs add it to what the
matrix puts out. `TAKES` is from llama.cpp's src/models: there a bias is optional
(``TENSOR_NOT_REQUIRED``) and is added right behind the product.
"""

from __future__ import annotations

from collections.abc import Mapping

WEIGHT, BIAS = ".weight", ".bias"

_PRODUCTS = frozenset({"attn_q", "attn_k", "attn_v"})
_ALL = _PRODUCTS | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}

TAKES: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("llama", "mistral3", "granite"), _ALL),
    **dict.fromkeys(("qwen2", "qwen3"), _PRODUCTS),
}
"""The matrices of a block that may have a bias, by architecture; experts have none."""


def takes_bias(arch: str, name: str) -> bool:
    """Whether llama.cpp adds a bias, if there is one, to what the weight ``name`` puts out."""
    leaf = name.removesuffix(WEIGHT).rpartition(".")[2]
    return name.startswith("blk.") and name.endswith(WEIGHT) and leaf in TAKES.get(arch, ())


def bias_name(weight: str) -> str:
    """What the bias of a weight is called."""
    return weight.removesuffix(WEIGHT) + BIAS
