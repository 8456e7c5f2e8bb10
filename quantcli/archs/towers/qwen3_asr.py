"""Qwen3-ASR's ear: three convolutions over each second, then a transformer; llama.cpp's "qwen3a".

Positions are computed and begin again with each second; eight seconds are encoded at a time. In the
last of them llama.cpp also encodes the silence that fills the last second, which a note tells.

Refused: other lengths of a second or of what is encoded at a time, scaled embeddings, an activation
other than GELU.
Sources: llama.cpp's tools/mtmd/models/qwen3a.cpp, transformers' modeling_qwen3_asr.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from quantcli.archs.config import check_fixed, class_name, integer
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Part, Values
from quantcli.archs.towers.base import Tower, Wrapper
from quantcli.archs.towers.parts import tensor
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, boolean, f32, text, u32

_EPSILON = 1e-5
_POSITIONS = 1500
"""Rows of the table of positions, as llama.cpp's converter writes it; a second has 13."""
_DEFAULTS = {
    "num_mel_bins": 128, "encoder_layers": 24, "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096, "d_model": 1024, "downsample_hidden_size": 480, "n_window": 50,
    "n_window_infer": 800, "activation_function": "gelu", "scale_embedding": False,
}  # fmt: skip
_FIXED = {
    "n_window": (50,), "n_window_infer": (800,), "activation_function": ("gelu",),
    "scale_embedding": (False,),
}  # fmt: skip
_AT, _OF = "a.blk.{i}", "audio_tower.layers.{i}"
_CONVOLUTIONS = (
    tensor("a.conv2d.1.weight", "audio_tower.conv2d1.weight", "channels", 1, 3, 3),
    tensor("a.conv2d.2.weight", "audio_tower.conv2d2.weight", "channels", "channels", 3, 3),
    tensor("a.conv2d.3.weight", "audio_tower.conv2d3.weight", "channels", "channels", 3, 3),
    tensor("a.conv_out.weight", "audio_tower.conv_out.weight", "hidden", "seen"),
    *(
        replace(
            tensor(f"a.conv2d.{n}.bias", f"audio_tower.conv2d{n}.bias", "channels", 1, 1),
            stored=("channels",),
            parts=(Part((1, "channels", 1)),),
        )
        for n in (1, 2, 3)
    ),
)
_RULES = (
    *_CONVOLUTIONS,
    *biased(
        tensor(f"{_AT}.ln1.weight", f"{_OF}.self_attn_layer_norm.weight", "hidden"),
        tensor(f"{_AT}.ln2.weight", f"{_OF}.final_layer_norm.weight", "hidden"),
        *(
            tensor(
                f"{_AT}.attn_{name}.weight", f"{_OF}.self_attn.{proj}.weight", "hidden", "hidden"
            )
            for name, proj in (
                ("q", "q_proj"),
                ("k", "k_proj"),
                ("v", "v_proj"),
                ("out", "out_proj"),
            )
        ),
        tensor(f"{_AT}.ffn_up.weight", f"{_OF}.fc1.weight", "ff", "hidden"),
        tensor(f"{_AT}.ffn_down.weight", f"{_OF}.fc2.weight", "hidden", "ff"),
        tensor("a.post_ln.weight", "audio_tower.ln_post.weight", "hidden"),
        tensor("mm.a.mlp.1.weight", "multi_modal_projector.linear_1.weight", "hidden", "hidden"),
        tensor("mm.a.mlp.2.weight", "multi_modal_projector.linear_2.weight", "width", "hidden"),
    ),
)


def _audio(wrapper: Wrapper) -> dict[str, Any]:
    config = wrapper.section("audio_config", _DEFAULTS)
    check_fixed(config, _FIXED)
    return config


def _dims(wrapper: Wrapper) -> dict[str, int]:
    config = _audio(wrapper)
    hidden, heads = integer(config, "d_model"), integer(config, "encoder_attention_heads")
    if hidden % heads or hidden % 2:
        raise ArchitectureError(
            f"the audio tower of {class_name(config)} is {hidden} wide, which is not a multiple "
            f"of its {heads} heads, or odd"
        )
    bands, channels = integer(config, "num_mel_bins"), integer(config, "downsample_hidden_size")
    return {
        "layers": integer(config, "encoder_layers"),
        "hidden": hidden,
        "heads": heads,
        "ff": integer(config, "encoder_ffn_dim"),
        "mels": bands,
        "channels": channels,
        "seen": channels * -(-bands // 8),
        "width": integer({**wrapper.text, "architectures": config["architectures"]}, "hidden_size"),
    }


def _values(wrapper: Wrapper, dims: Dims) -> Values:
    half = dims["hidden"] // 2
    rates = np.exp(-np.log(10000.0) / max(half - 1, 1) * np.arange(half))
    angles = np.arange(_POSITIONS)[:, None] * rates
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return {"a.position_embd.weight": table.astype(np.float32)}


def _keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    return {
        "audio.projector_type": text("qwen3a"),
        "has_audio_encoder": boolean(True),
        "audio.projection_dim": u32(dims["width"]),
        "audio.embedding_length": u32(dims["hidden"]),
        "audio.feed_forward_length": u32(dims["ff"]),
        "audio.block_count": u32(dims["layers"]),
        "audio.attention.head_count": u32(dims["heads"]),
        "audio.num_mel_bins": u32(dims["mels"]),
        "audio.attention.layer_norm_epsilon": f32(_EPSILON),
    }


def _notes(wrapper: Wrapper) -> tuple[str, ...]:
    return (
        "llama.cpp fills a sound's last second with silence, which the model then hears; "
        "transformers leaves it out",
    )


QWEN3_ASR = Tower(
    own=r"(audio_tower|multi_modal_projector)\.",
    read_dims=_dims,
    read_rules=lambda wrapper: _RULES,
    to_keys=_keys,
    read_values=_values,
    read_notes=_notes,
    renames=(
        (r"^(model\.|thinker\.)?(audio_tower|multi_modal_projector)\.", r"\2."),
        (r"^audio_tower\.proj([12])\.", r"multi_modal_projector.linear_\1."),
    ),
)
