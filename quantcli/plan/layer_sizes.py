"""The sizes of a model that is run layer by layer: matrices of each layer, and what they share.

Read off the output tensors' names and shapes alone, no weights and no transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from quantcli.plan.names import EMBEDDING_NAME, HEAD_NAME
from quantcli.types import OutputTensor

if TYPE_CHECKING:
    from quantcli.model import Model

_LAYER = re.compile(r"(?:\w+\.)?blk\.(\d+)\.(\w+)\.weight$")
_ANY_LAYER = re.compile(r"(?:\w+\.)?blk\.(\d+)\.")
_SHARED = {
    "attention": (
        "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_gate", "attn_q_a", "attn_kv_a_mqa",
        "ssm_in", "ssm_alpha", "ssm_beta", "ssm_beta_alpha",
    ),
    "feed-forward": (
        "ffn_gate", "ffn_up", "ffn_gate_inp", "ffn_gate_shexp", "ffn_up_shexp",
        "ffn_gate_inp_shexp",
    ),
    "experts": ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"),
}  # fmt: skip
"""Names of matrices that are multiplied with one input."""
_INPUT_OF = {name: kind for kind, names in _SHARED.items() for name in names}
_EXPERTS_USED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")


@dataclass(frozen=True)
class MatrixSize:
    """``matrices`` of (rows, columns) in one tensor; ``input`` is equal for those that share one.

    ``used`` of them meet each token.
    """

    name: str
    matrices: int
    rows: int
    columns: int
    input: str
    used: int = 1

    @property
    def elements(self) -> int:
        """Weights of all together."""
        return self.matrices * self.rows * self.columns

    @property
    def active(self) -> int:
        """Weights that a token meets."""
        return self.used * self.rows * self.columns


@dataclass(frozen=True)
class LayerSize:
    """A layer's matrices, all its weights, and their bytes as they are stored."""

    matrices: tuple[MatrixSize, ...]
    elements: int
    stored: int

    @cached_property
    def inputs(self) -> dict[str, MatrixSize]:
        """The first matrix of each input."""
        found: dict[str, MatrixSize] = {}
        for matrix in self.matrices:
            found.setdefault(matrix.input, matrix)
        return found

    @property
    def active(self) -> int:
        """Weights that a token meets."""
        return sum(matrix.active for matrix in self.matrices)

    @property
    def outputs(self) -> int:
        """Values that the products with a token put out."""
        return sum(matrix.used * matrix.rows for matrix in self.matrices)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model: ``hidden`` values of a state, ``vocabulary`` rows of the embedding.

    ``outside`` are the weights in no layer but the embedding's and the head's.
    """

    hidden: int
    vocabulary: int
    layers: tuple[LayerSize, ...]
    embedding: MatrixSize
    head: MatrixSize
    tied: bool
    outside: int
    stored: int

    @property
    def largest(self) -> LayerSize:
        """The layer with most weights."""
        return max(self.layers, key=lambda layer: layer.elements)


def measure_sizes(model: Model) -> ModelSizes | None:
    """The sizes of ``model``; None where it has no layers or no embedding that names tell."""
    config = _text_config(model.config)
    unseen = {tensor.name for tensor in model.mtp_tensors}
    tensors = [tensor for tensor in model.tensors if tensor.name not in unseen]
    by_name = {tensor.name: tensor for tensor in tensors}
    embedding = by_name.get(EMBEDDING_NAME)
    if embedding is None:
        return None
    used = next((int(config[key]) for key in _EXPERTS_USED if config.get(key)), 1)
    groups: dict[int, list[OutputTensor]] = {}
    for tensor in tensors:
        found = _ANY_LAYER.match(tensor.name)
        if found:
            groups.setdefault(int(found[1]), []).append(tensor)
    if not groups:
        return None
    streams = int(config.get("altup_num_inputs") or 1)
    head = by_name.get(HEAD_NAME)
    table = _matrix(embedding, "embedding", 1)
    outside = sum(
        tensor.elements for tensor in tensors
        if not _ANY_LAYER.match(tensor.name) and tensor.name not in (EMBEDDING_NAME, HEAD_NAME)
    )  # fmt: skip
    return ModelSizes(
        embedding.columns * streams, embedding.rows,
        tuple(_layer(model, groups[number], used) for number in sorted(groups)),
        table, table if head is None else _matrix(head, "head", 1), head is None, outside,
        sum(model.stored_bytes(tensor) for tensor in tensors),
    )  # fmt: skip


def _layer(model: Model, tensors: Iterable[OutputTensor], used: int) -> LayerSize:
    own = list(tensors)
    matrices = []
    for tensor in own:
        found = _LAYER.match(tensor.name)
        if len(tensor.shape) > 1 and found:
            kind = _INPUT_OF.get(found[2], tensor.name)
            matrices.append(_matrix(tensor, kind, used))
    return LayerSize(
        tuple(matrices),
        sum(tensor.elements for tensor in own),
        sum(model.stored_bytes(tensor) for tensor in own),
    )


def _matrix(tensor: OutputTensor, kind: str, used: int) -> MatrixSize:
    count = tensor.matrices
    return MatrixSize(tensor.name, count, tensor.shape[-2], tensor.columns, kind, min(used, count))


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, Mapping) else config
