"""What a tensor's GGUF name says: its role, its block, its place in the file, and what stays float.

llama.cpp decides by name alone, and so do we: the tables below are its own categories and its own
list of tensors that are never quantized (``tensor_get_category`` and ``tensor_allows_quantization``
in src/llama-quant.cpp), and the order of tensors is the one in which its loader sorts them
(``weight_name_comparer``): tensors outside the blocks first, then block by block as numbers (block
2 before block 10), then by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache

from quantcli.types import OutputTensor

HEAD_NAME = "output.weight"
EMBEDDING_NAME = "token_embd.weight"
PER_LAYER_EMBEDDING = "per_layer_token_embd.weight"
_EMBEDDINGS = (EMBEDDING_NAME, PER_LAYER_EMBEDDING)


class Kind(Enum):
    """The role of a tensor; the value is how a sentence calls it."""

    HEAD = "the output head"
    EMBEDDING = "the token embedding"
    QKV = "attn_qkv"
    KV_B = "attn_kv_b"
    V = "attn_v"
    K = "attn_k"
    Q = "attn_q"
    ATTENTION_OUTPUT = "attn_output"
    UP = "ffn_up"
    GATE = "ffn_gate"
    DOWN = "ffn_down"
    OTHER = "the tensor"


VALUE_LIKE = frozenset({Kind.V, Kind.QKV, Kind.KV_B})
"""Roles that hold attention values: the most sensitive, and counted together."""

_KINDS: tuple[tuple[str, Kind], ...] = (
    ("attn_qkv.weight", Kind.QKV),
    ("attn_kv_b.weight", Kind.KV_B),
    ("attn_v.weight", Kind.V),
    ("attn_k.weight", Kind.K),
    ("attn_q.weight", Kind.Q),
    ("attn_output.weight", Kind.ATTENTION_OUTPUT),
    ("ffn_up", Kind.UP),
    ("ffn_gate", Kind.GATE),
    ("ffn_down", Kind.DOWN),
)
"""Parts of names, the first that occurs decides."""

_KEPT_NAMES = frozenset({"position_embd.weight", "token_types.weight"})
_KEPT_PARTS = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight",
    "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight",
    "indexer.k_proj.weight", "indexer.q_proj.weight",
    "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight",
    "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight",
    "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight",
    "time_mix_g1.weight", "time_mix_g2.weight",
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd",
    ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_KEPT_PARTS_OF = {
    "glm5-next": (
        "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate",
        "indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight",
        "ssm_g_b.weight", "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight",
        "attn_v_b.weight",
    ),
}  # fmt: skip

_F32_PARTS = (
    "_norm.weight", "ffn_gate_inp", "position_embd.weight", "token_types.weight",
    "ssm_conv1d", "shortconv.conv.weight",
    "time_mix_first.weight", "time_mix_w1.weight", "time_mix_w2.weight",
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight",
    "altup_correct_coef.weight", "altup_predict_coef.weight",
)  # fmt: skip
"""What llama.cpp's converter writes as F32 whatever the type (prepare_tensors)."""

_TOWER_KERNELS = (
    ".patch_embd.", "mm.patch_merger.", "mm.input_projection.", "a.conv1d.", "a.conv2d.",
)  # fmt: skip
"""Of a vision or audio tower: kernels of convolutions, and a matrix that ggml transposes."""

_TOWER_F32 = (".conv_dw.",)
"""Kernels that ggml takes in F32 only."""

_CACHED_NAMES = 1 << 14
"""A model's names are looked at again for each file type that its sizes are asked for."""

_BLOCK = re.compile(r"blk\.(\d+)\.")


@lru_cache(maxsize=_CACHED_NAMES)
def kind_of(name: str) -> Kind:
    """The role of the tensor of that name."""
    if name == HEAD_NAME:
        return Kind.HEAD
    if name in _EMBEDDINGS:
        return Kind.EMBEDDING
    return next((kind for part, kind in _KINDS if part in name), Kind.OTHER)


def block_index(name: str) -> int | None:
    """The number of the block that the tensor belongs to, None outside the blocks."""
    found = _BLOCK.match(name)
    return int(found[1]) if found else None


def output_order(tensors: Iterable[OutputTensor]) -> list[OutputTensor]:
    """The tensors in the order in which llama-quantize writes them."""
    return sorted(tensors, key=lambda tensor: _sort_key(tensor.name))


def _sort_key(name: str) -> tuple[int, bytes]:
    block = block_index(name)
    return (-1 if block is None else block, name.encode())


def dimensions(shape: tuple[int, ...]) -> int:
    """Dimensions as ggml counts them: leading axes of length one do not count; at least 1."""
    lengths = [axis for axis, length in enumerate(reversed(shape), 1) if length > 1]
    return max(lengths, default=1)


@lru_cache(maxsize=_CACHED_NAMES)
def may_be_quantized(name: str, shape: tuple[int, ...], arch: str) -> bool:
    """Whether llama.cpp ever gives this tensor a type other than the one it is stored in."""
    return (
        dimensions(shape) >= 2
        and name.endswith("weight")
        and name not in _KEPT_NAMES
        and not any(part in name for part in _KEPT_PARTS)
        and not any(part in name for part in _KEPT_PARTS_OF.get(arch, ()))
    )


def is_always_f32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a converted checkpoint holds this tensor in F32 whatever the type."""
    return (
        len(shape) <= 1 or not name.endswith(".weight") or any(part in name for part in _F32_PARTS)
    )


def tower_type(name: str, shape: tuple[int, ...], base: str) -> str | None:
    """F32 or F16 for a tensor of a vision or audio tower that ggml takes in no other type.

    Where either does, llama.cpp's converter chooses F16 for files of that type, F32 for others.
    None where any type does.
    """
    if len(shape) < 2 or not name.endswith((".weight", ".weight.1")):
        return None
    if any(part in name for part in _TOWER_F32):
        return "F32"
    if any(part in name for part in _TOWER_KERNELS):
        return "F16" if base == "F16" else "F32"
    return None
