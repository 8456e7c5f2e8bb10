"""InternLM 2 and 2.5: Llama with q, k and v in one matrix; llama.cpp's "internlm2".

The matrix holds, for each key-value head, the queries that share it, then its key and its value;
llama.cpp has the three apart, rows of q and k interleaved as Llama's are.

Refused: biases, and embeddings as output matrix, which llama.cpp requires.
Sources: arXiv:2403.17297, the modeling_internlm2.py of the checkpoints, llama.cpp's
src/models/internlm2.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config
from quantcli.archs.decoder import attention_dims, check_square, decoder_config, layer
from quantcli.archs.fold import DECODER
from quantcli.archs.header import Header
from quantcli.archs.llama import keys
from quantcli.archs.rules import Part, Rule

_GROUPS = ("kv_heads", "key_and_value", 2, "half", "hidden")
_TURNED = (0, 1, 3, 2, 4)
_PLACES: dict[str, tuple[tuple[str | int, str], str]] = {
    "attn_q": ((0, "sharers"), "q"),
    "attn_k": (("sharers", "key"), "kv"),
    "attn_v": (("key", "key_and_value"), "kv"),
}
"""Which rows of each group make a matrix, and its height."""
_QKV = tuple(
    replace(
        layer(f"{name}.weight", "attention.wqkv.weight", height, "hidden"),
        stored=("qkv", "hidden"),
        parts=(Part(_GROUPS, () if name == "attn_v" else _TURNED, cut=((1, *place),)),),
    )
    for name, (place, height) in _PLACES.items()
)
_RULES = (
    Rule("token_embd.weight", "model.tok_embeddings.weight", ("vocab", "hidden")),
    Rule("output_norm.weight", "model.norm.weight", ("hidden",)),
    Rule("output.weight", "output.weight", ("vocab", "hidden")),
    layer("attn_norm.weight", "attention_norm.weight", "hidden"),
    *_QKV,
    layer("attn_output.weight", "attention.wo.weight", "hidden", "q"),
    layer("ffn_norm.weight", "ffn_norm.weight", "hidden"),
    layer("ffn_gate.weight", "feed_forward.w1.weight", "ff", "hidden"),
    layer("ffn_up.weight", "feed_forward.w3.weight", "ff", "hidden"),
    layer("ffn_down.weight", "feed_forward.w2.weight", "hidden", "ff"),
)


def _dims(config: Config) -> dict[str, int]:
    dims = attention_dims(config)
    sharers = dims["heads"] // dims["kv_heads"]
    return {
        **dims,
        "half": dims["head_dim"] // 2,
        "qkv": dims["q"] + 2 * dims["kv"],
        "sharers": sharers,
        "key": sharers + 1,
        "key_and_value": sharers + 2,
    }


def _rules(config: Config) -> tuple[Rule, ...]:
    return _RULES


def _config(header: Header) -> dict[str, Any]:
    return decoder_config(header, "InternLM2ForCausalLM", "internlm2")


INTERNLM2 = Architecture(
    name="internlm2",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=keys,
    to_config=_config,
    check=check_square,
    defaults={"tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    fixed={
        "hidden_act": ("silu", "swish"),
        "bias": (False,),
        "tie_word_embeddings": (False,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=DECODER,
)
