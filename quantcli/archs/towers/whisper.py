"""Whisper's encoder before a language model: Qwen2-Audio, Audio Flamingo 3.

llama.cpp's "qwen2a" and "musicflamingo" share its graph: two convolutions over the mel spectrogram,
fixed positions, blocks whose keys have no bias, pairs of frames averaged before the projector.

Refused: an activation other than GELU.
Sources: llama.cpp's tools/mtmd/models/whisper-enc.cpp, transformers' modeling_qwen2_audio.py,
modeling_flamingo.py, modeling_audioflamingo3.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.config import Config, check_fixed, class_name, integer
from quantcli.archs.decoder import biased
from quantcli.archs.rules import Dims, Part, Rule
from quantcli.archs.towers.base import Tower, Wrapper
from quantcli.archs.towers.parts import tensor
from quantcli.errors import ArchitectureError
from quantcli.types import MetaValue, boolean, f32, text, u32

_EPSILON = 1e-5
"""Of nn.LayerNorm, where Whisper names none."""
_SHARED = {"num_mel_bins": 128, "max_source_positions": 1500, "activation_function": "gelu"}
_QWEN2 = {
    **_SHARED, "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
}  # fmt: skip
_FLAMINGO = {
    **_SHARED, "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20,
    "intermediate_size": 5120,
}  # fmt: skip
_AT, _OF = "a.blk.{i}", "audio_tower.layers.{i}"
_KEYS = tensor(f"{_AT}.attn_k.weight", f"{_OF}.self_attn.k_proj.weight", "hidden", "hidden")
_ENCODER = (
    *biased(
        tensor(f"{_AT}.ln1.weight", f"{_OF}.self_attn_layer_norm.weight", "hidden"),
        tensor(f"{_AT}.ln2.weight", f"{_OF}.final_layer_norm.weight", "hidden"),
        *(
            tensor(
                f"{_AT}.attn_{name}.weight", f"{_OF}.self_attn.{proj}.weight", "hidden", "hidden"
            )
            for name, proj in (("q", "q_proj"), ("v", "v_proj"), ("out", "out_proj"))
        ),
        tensor(f"{_AT}.ffn_up.weight", f"{_OF}.fc1.weight", "ff", "hidden"),
        tensor(f"{_AT}.ffn_down.weight", f"{_OF}.fc2.weight", "hidden", "ff"),
        tensor("a.post_ln.weight", "audio_tower.layer_norm.weight", "hidden"),
    ),
    _KEYS,
    tensor("a.conv1d.1.weight", "audio_tower.conv1.weight", "hidden", "mels", 3),
    tensor("a.conv1d.2.weight", "audio_tower.conv2.weight", "hidden", "hidden", 3),
    *(
        replace(
            tensor(f"a.conv1d.{number}.bias", f"audio_tower.conv{number}.bias", "hidden", 1),
            stored=("hidden",),
            parts=(Part(("hidden", 1)),),
        )
        for number in (1, 2)
    ),
    tensor("a.position_embd.weight", "audio_tower.embed_positions.weight", "positions", "hidden"),
)


def _qwen2(wrapper: Wrapper) -> dict[str, Any]:
    """audio_config with the names that other towers have."""
    config = wrapper.section("audio_config", _QWEN2)
    return {
        **config,
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["encoder_layers"],
        "num_attention_heads": config["encoder_attention_heads"],
        "intermediate_size": config["encoder_ffn_dim"],
    }


def _flamingo(wrapper: Wrapper) -> dict[str, Any]:
    return wrapper.section("audio_config", _FLAMINGO)


def _dims(wrapper: Wrapper, config: Config) -> dict[str, int]:
    check_fixed(config, {"activation_function": ("gelu",)})
    check_fixed(wrapper.config, {"projector_hidden_act": ("gelu",)})
    hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    if hidden % heads:
        raise ArchitectureError(
            f"the audio tower of {class_name(config)} is {hidden} wide, which is not a multiple "
            f"of its {heads} heads"
        )
    return {
        "layers": integer(config, "num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "ff": integer(config, "intermediate_size"),
        "mels": integer(config, "num_mel_bins"),
        "positions": integer(config, "max_source_positions"),
        "width": integer({**wrapper.text, "architectures": config["architectures"]}, "hidden_size"),
    }


def _audio_keys(dims: Dims, projector: str) -> dict[str, MetaValue]:
    return {
        "projector_type": text(projector),
        "has_audio_encoder": boolean(True),
        "audio.projection_dim": u32(dims["width"]),
        "audio.embedding_length": u32(dims["hidden"]),
        "audio.feed_forward_length": u32(dims["ff"]),
        "audio.block_count": u32(dims["layers"]),
        "audio.attention.head_count": u32(dims["heads"]),
        "audio.num_mel_bins": u32(dims["mels"]),
        "audio.attention.layer_norm_epsilon": f32(_EPSILON),
    }


def _qwen2_rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    projector = tensor("mm.a.fc.weight", "multi_modal_projector.linear.weight", "width", "hidden")
    return (*_ENCODER, *biased(projector))


def _flamingo_rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    return (
        *_ENCODER,
        *biased(
            tensor("mm.a.mlp.1.weight", "multi_modal_projector.linear_1.weight", "width", "hidden"),
            tensor("mm.a.mlp.2.weight", "multi_modal_projector.linear_2.weight", "width", "width"),
        ),
    )


_OWN = r"(audio_tower|multi_modal_projector)\."
_RENAMES = ((r"^model\.(audio_tower|multi_modal_projector)\.", r"\1."),)

QWEN2_AUDIO = Tower(
    own=_OWN,
    read_dims=lambda wrapper: _dims(wrapper, _qwen2(wrapper)),
    read_rules=_qwen2_rules,
    to_keys=lambda wrapper, dims: _audio_keys(dims, "qwen2a"),
    renames=_RENAMES,
)
AUDIO_FLAMINGO3 = Tower(
    own=_OWN,
    read_dims=lambda wrapper: _dims(wrapper, _flamingo(wrapper)),
    read_rules=_flamingo_rules,
    to_keys=lambda wrapper, dims: _audio_keys(dims, "musicflamingo"),
    renames=_RENAMES,
)
