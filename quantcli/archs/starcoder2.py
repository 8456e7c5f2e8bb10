"""StarCoder2: LayerNorms and biases throughout, grouped queries, rotation; "starcoder2".

llama.cpp applies no sliding window (a note says so).
Sources: arXiv:2402.19173, transformers' modeling_starcoder2.py, llama.cpp's
src/models/starcoder2.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config
from quantcli.archs.decoder import (
    ATTENTION,
    EMBEDDING,
    EPSILON,
    NORMS,
    OUTPUT_NORM,
    attention_dims,
    biased,
    check_square,
    decoder_config,
    decoder_keys,
    layer,
    output,
    unwindowed_note,
)
from quantcli.archs.fold import LAYER_NORMED
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys
from quantcli.archs.rules import Dims, Rule
from quantcli.types import MetaValue

_MLP = (
    layer("ffn_up.weight", "mlp.c_fc.weight", "ff", "hidden"),
    layer("ffn_down.weight", "mlp.c_proj.weight", "hidden", "ff"),
)


def _rules(config: Config) -> tuple[Rule, ...]:
    return (EMBEDDING, output(config), *biased(OUTPUT_NORM, *NORMS, *ATTENTION, *_MLP))


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    keys = decoder_keys(config, dims, epsilon="norm_epsilon", key=EPSILON)
    return {**keys, **rope_keys(read_rope(config, ("default", "linear", "yarn")))}


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(
        header, "Starcoder2ForCausalLM", "starcoder2", epsilon="norm_epsilon", key=EPSILON
    )
    return {**config, "sliding_window": None}


STARCODER2 = Architecture(
    name="starcoder2",
    read_dims=attention_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=_config,
    check=check_square,
    read_notes=unwindowed_note,
    defaults={"norm_epsilon": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True},
    fixed={
        "hidden_act": ("gelu_pytorch_tanh",),
        "use_bias": (True,),
        "norm_type": ("layer_norm",),
        "mlp_type": ("default",),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=LAYER_NORMED,
)
