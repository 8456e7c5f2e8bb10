"""SmolLM3: Llama whose every fourth layer has no rotation; llama.cpp's "smollm3".

Refused: rotation left out in other layers than every fourth, which llama.cpp takes for granted, and
biases and sliding windows, which no published model has.
Sources: Hugging Face's model card, transformers' modeling_smollm3.py, llama.cpp's
src/models/smollm3.cpp.
"""

from __future__ import annotations

from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name
from quantcli.archs.decoder import attention_dims, decoder_config
from quantcli.archs.fold import DECODER
from quantcli.archs.header import Header
from quantcli.archs.llama import keys, rules
from quantcli.archs.rules import Dims
from quantcli.errors import ArchitectureError

_EVERY = 4


def _check(config: Config, dims: Dims) -> None:
    every = config.get("no_rope_layer_interval") or _EVERY
    given = config.get("no_rope_layers")
    layers = range(1, dims["layers"] + 1)
    rotated = (
        given[: len(layers)] if isinstance(given, list) else [int(i % every > 0) for i in layers]
    )
    if rotated != [int(i % _EVERY > 0) for i in layers]:
        raise ArchitectureError(
            f"config.json of {class_name(config)} leaves out the rotation in layers that llama.cpp "
            f"rotates, or the other way round: it rotates all but each {_EVERY}th"
        )


def _config(header: Header) -> dict[str, Any]:
    config = decoder_config(header, "SmolLM3ForCausalLM", "smollm3")
    return {**config, "no_rope_layer_interval": _EVERY}


SMOLLM3 = Architecture(
    name="smollm3",
    read_dims=attention_dims,
    read_rules=rules,
    to_keys=keys,
    to_config=_config,
    check=_check,
    defaults={"tie_word_embeddings": True, "rope_theta": 2000000.0, "rms_norm_eps": 1e-6},
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_sliding_window": (False,),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
    folds=DECODER,
)
