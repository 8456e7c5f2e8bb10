"""Where llama.cpp puts the tensors of a file: the embeddings stay in memory, layers go to a GPU.

A head that shares the embeddings' tensor is copied to the GPU. Blocks for multi-token prediction
are left on disk. Source: ``LLM_TENSOR_INFOS`` in src/llama-arch.cpp and ``load_tensors`` in
src/llama-model.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantcli.plan.names import EMBEDDING_NAME, HEAD_NAME, block_index

_INPUT = ("token_embd", "per_layer_token_embd", "position_embd", "token_types")


@dataclass(frozen=True)
class Weights:
    """Bytes of a file's tensors by place.

    ``layers`` has one entry for each layer, ``experts`` what of it are stacked experts.
    """

    name: str
    inputs: int
    head: int
    shared_head: int
    layers: tuple[int, ...]
    experts: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes that are loaded, each once."""
        return self.inputs + self.head + sum(self.layers)


def place_weights(name: str, sizes: Mapping[str, int], layers: int) -> Weights:
    """The places of tensors with these bytes, of a model with so many layers."""
    blocks, experts = [0] * layers, [0] * layers
    inputs = head = 0
    for tensor, nbytes in sizes.items():
        block = block_index(tensor)
        if block is None:
            if tensor.startswith(_INPUT):
                inputs += nbytes
            else:
                head += nbytes
        elif block < layers:
            blocks[block] += nbytes
            experts[block] += nbytes if "_exps." in tensor else 0
    shared = 0 if HEAD_NAME in sizes else sizes.get(EMBEDDING_NAME, 0)
    return Weights(name, inputs, head, shared, tuple(blocks), tuple(experts))
