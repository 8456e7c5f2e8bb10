"""Gemma 4's eyes and ears; llama.cpp's "gemma4v" and "gemma4a".

The vision tower norms queries, keys and values, rotates in two dimensions, adds positions from two
tables (across and down), and averages squares of patches. The audio tower is a conformer over mel
bands: half an MLP, attention to the last 12 frames, a convolution, another half. Linear layers may
clamp what goes in and comes out; their limits are tensors of one number. Larger models have no
ears.

llama.cpp takes quick GELU where the file names none, so it is named. The names of the conformer's
two norms around its convolution are swapped in llama.cpp, both in its converter and its loader.

Refused: other sizes of the conformer's convolution, chunk and context than llama.cpp's constants.
Sources: llama.cpp's tools/mtmd/models/gemma4v.cpp and gemma4a.cpp, transformers'
modeling_gemma4.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from quantcli.archs.config import check_fixed, class_name, flag, integer, number
from quantcli.archs.rules import Dims, Rule, Size
from quantcli.archs.towers.base import Tower, Wrapper, activation_keys, vision_keys
from quantcli.archs.towers.parts import check_base, integers, patch_rows, tensor, vision_dims
from quantcli.errors import ArchitectureError
from quantcli.pieces import Finite, Softplus
from quantcli.types import MetaValue, boolean, f32, text, u32

_LIMITS = ("input_max", "input_min", "output_max", "output_min")
_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16,
    "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64, "patch_size": 16,
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "pooling_kernel_size": 3,
    "position_embedding_size": 10240, "use_clipped_linears": False, "standardize": False,
    "attention_bias": False, "image_size": 224,
}  # fmt: skip
_AUDIO = {
    "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8, "hidden_act": "silu",
    "subsampling_conv_channels": [128, 32], "conv_kernel_size": 5, "residual_weight": 0.5,
    "attention_chunk_size": 12, "attention_context_left": 13, "attention_context_right": 0,
    "attention_logit_cap": 50.0, "use_clipped_linears": True, "rms_norm_eps": 1e-6,
    "output_proj_dims": 1536,
}  # fmt: skip
_AUDIO_FIXED = {
    "hidden_act": ("silu",), "conv_kernel_size": (5,), "residual_weight": (0.5,),
    "attention_chunk_size": (12,), "attention_context_left": (13,), "attention_context_right": (0,),
    "attention_logit_cap": (50.0,), "rms_norm_eps": (1e-6,),
}  # fmt: skip
_POOLING = 3
"""The side of the averaged squares, where the file names none."""
_EYE, _EAR = "vision_tower.encoder.layers.{i}", "audio_tower.layers.{i}"


def _linear(name: str, source: str, rows: Size, columns: Size, *, clipped: bool) -> Iterable[Rule]:
    """A matrix, and the limits of what goes in and comes out where it has some."""
    yield tensor(f"{name}.weight", f"{source}.linear.weight", rows, columns)
    for limit in _LIMITS if clipped else ():
        rule = tensor(f"{name}.{limit}", f"{source}.{limit}", 1)
        yield replace(rule, stored=(), pointwise=Finite())


def _vision(wrapper: Wrapper) -> dict[str, Any]:
    config = wrapper.section("vision_config", _VISION)
    config["image_size"] = _VISION["image_size"]
    heads = (config["num_attention_heads"],)
    check_fixed(config, {"attention_bias": (False,), "num_key_value_heads": heads})
    check_base(config, 100.0)
    return config


def _vision_rules(config: dict[str, Any]) -> Iterable[Rule]:
    at, clipped = "v.blk.{i}", flag(config, "use_clipped_linears")
    norms = (
        ("ln1", "input_layernorm", "hidden"),
        ("ln2", "pre_feedforward_layernorm", "hidden"),
        ("attn_post_norm", "post_attention_layernorm", "hidden"),
        ("ffn_post_norm", "post_feedforward_layernorm", "hidden"),
        ("attn_q_norm", "self_attn.q_norm", "head_dim"),
        ("attn_k_norm", "self_attn.k_norm", "head_dim"),
    )
    for name, source, size in norms:
        yield tensor(f"{at}.{name}.weight", f"{_EYE}.{source}.weight", size)
    for name in "qkv":
        source = f"{_EYE}.self_attn.{name}_proj"
        yield from _linear(f"{at}.attn_{name}", source, "q", "hidden", clipped=clipped)
    source = f"{_EYE}.self_attn.o_proj"
    yield from _linear(f"{at}.attn_out", source, "hidden", "q", clipped=clipped)
    for name in ("gate", "up"):
        source = f"{_EYE}.mlp.{name}_proj"
        yield from _linear(f"{at}.ffn_{name}", source, "ff", "hidden", clipped=clipped)
    source = f"{_EYE}.mlp.down_proj"
    yield from _linear(f"{at}.ffn_down", source, "hidden", "ff", clipped=clipped)
    embedder = "vision_tower.patch_embedder"
    yield patch_rows(f"{embedder}.input_proj.weight", channels_last=True)
    table = f"{embedder}.position_embedding_table"
    yield tensor("v.position_embd.weight", table, 2, "positions", "hidden")
    if flag(config, "standardize"):
        yield tensor("v.std_bias", "vision_tower.std_bias", "hidden")
        yield tensor("v.std_scale", "vision_tower.std_scale", "hidden")
    projection = "embed_vision.embedding_projection.weight"
    yield tensor("mm.input_projection.weight", projection, "width", "hidden")


def _has_ears(wrapper: Wrapper) -> bool:
    return isinstance(wrapper.config.get("audio_config"), dict)


def _audio(wrapper: Wrapper) -> dict[str, Any]:
    config = wrapper.section("audio_config", _AUDIO)
    check_fixed(config, _AUDIO_FIXED)
    return config


def _audio_rules(config: dict[str, Any]) -> Iterable[Rule]:
    clipped, layers = (
        flag(config, "use_clipped_linears"),
        range(integer(config, "num_hidden_layers")),
    )
    for rule in _conformer(clipped=clipped):
        yield replace(rule, layers=layers)
    conv = "audio_tower.subsample_conv_projection"
    yield tensor("a.conv1d.0.weight", f"{conv}.layer0.conv.weight", "a_conv0", 1, 3, 3)
    yield tensor("a.conv1d.1.weight", f"{conv}.layer1.conv.weight", "a_conv1", "a_conv0", 3, 3)
    for index, size in enumerate(("a_conv0", "a_conv1")):
        yield tensor(f"a.conv1d.{index}.norm.weight", f"{conv}.layer{index}.norm.weight", size)
    projection = f"{conv}.input_proj_linear.weight"
    yield tensor("a.input_projection.weight", projection, "a_hidden", "a_seen")
    yield tensor("a.pre_encode.out.weight", "audio_tower.output_proj.weight", "a_out", "a_hidden")
    yield tensor("a.pre_encode.out.bias", "audio_tower.output_proj.bias", "a_out")
    embedding = "embed_audio.embedding_projection.weight"
    yield tensor("mm.a.input_projection.weight", embedding, "width", "a_out")


def _conformer(*, clipped: bool) -> Iterable[Rule]:
    at = "a.blk.{i}"
    norms = (
        ("ffn_norm", "feed_forward1.pre_layer_norm"),
        ("ffn_post_norm", "feed_forward1.post_layer_norm"),
        ("attn_pre_norm", "norm_pre_attn"),
        ("attn_post_norm", "norm_post_attn"),
        ("conv_norm", "lconv1d.pre_layer_norm"),
        ("norm_conv", "lconv1d.conv_norm"),
        ("ffn_norm_1", "feed_forward2.pre_layer_norm"),
        ("ffn_post_norm_1", "feed_forward2.post_layer_norm"),
        ("ln2", "norm_out"),
    )
    for name, source in norms:
        yield tensor(f"{at}.{name}.weight", f"{_EAR}.{source}.weight", "a_hidden")
    matrices = (
        ("ffn_up", "feed_forward1.ffw_layer_1", "a_ff", "a_hidden"),
        ("ffn_down", "feed_forward1.ffw_layer_2", "a_hidden", "a_ff"),
        ("attn_q", "self_attn.q_proj", "a_hidden", "a_hidden"),
        ("attn_k", "self_attn.k_proj", "a_hidden", "a_hidden"),
        ("attn_v", "self_attn.v_proj", "a_hidden", "a_hidden"),
        ("attn_out", "self_attn.post", "a_hidden", "a_hidden"),
        ("conv_pw1", "lconv1d.linear_start", "a_glu", "a_hidden"),
        ("conv_pw2", "lconv1d.linear_end", "a_hidden", "a_hidden"),
        ("ffn_up_1", "feed_forward2.ffw_layer_1", "a_ff", "a_hidden"),
        ("ffn_down_1", "feed_forward2.ffw_layer_2", "a_hidden", "a_ff"),
    )
    for name, source, rows, columns in matrices:
        yield from _linear(f"{at}.{name}", f"{_EAR}.{source}", rows, columns, clipped=clipped)
    relative = f"{_EAR}.self_attn.relative_k_proj.weight"
    yield tensor(f"{at}.attn_k_rel.weight", relative, "a_hidden", "a_hidden")
    scale = tensor(f"{at}.per_dim_scale.weight", f"{_EAR}.self_attn.per_dim_scale", "a_head")
    yield replace(scale, pointwise=Softplus())
    kernel = f"{_EAR}.lconv1d.depthwise_conv1d.weight"
    yield replace(
        tensor(f"{at}.conv_dw.weight", kernel, "a_hidden", "a_kernel"),
        stored=("a_hidden", 1, "a_kernel"),
    )


def _dims(wrapper: Wrapper) -> dict[str, int]:
    config = _vision(wrapper)
    head = integer(config, "head_dim")
    dims = {
        **vision_dims(wrapper, config),
        "head_dim": head,
        "q": head * integer(config, "num_attention_heads"),
        "positions": integer(config, "position_embedding_size"),
    }
    if _has_ears(wrapper):
        dims |= _audio_dims(_audio(wrapper))
    return dims


def _audio_dims(config: dict[str, Any]) -> dict[str, int]:
    hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    # transformers' code takes as many mel bands as there are channels in the first convolution.
    channels = integers(config, "subsampling_conv_channels")
    if len(channels) != 2:
        raise ArchitectureError(
            f"subsampling_conv_channels of {class_name(config)} in config.json has "
            f"{len(channels)} numbers, but llama.cpp's audio tower has two convolutions"
        )
    first, second = channels
    return {
        "a_layers": integer(config, "num_hidden_layers"),
        "a_hidden": hidden,
        "a_heads": heads,
        "a_head": hidden // heads,
        "a_ff": 4 * hidden,
        "a_glu": 2 * hidden,
        "a_kernel": integer(config, "conv_kernel_size"),
        "a_conv0": first,
        "a_conv1": second,
        "a_bands": first,
        "a_seen": first // 4 * second,
        "a_out": integer(config, "output_proj_dims"),
    }


def _rules(wrapper: Wrapper) -> tuple[Rule, ...]:
    ears = _audio_rules(_audio(wrapper)) if _has_ears(wrapper) else ()
    return (*_vision_rules(_vision(wrapper)), *ears)


def _keys(wrapper: Wrapper, dims: Dims) -> dict[str, MetaValue]:
    config = _vision(wrapper)
    found = vision_keys(wrapper, dims, "gemma4v", number(config, "rms_norm_eps"))
    keys = {"vision.projector_type": found.pop("projector_type"), **found}
    keys |= activation_keys(config, "hidden_activation")
    pooling = integer(config, "pooling_kernel_size")
    if pooling != _POOLING:
        keys["vision.projector.scale_factor"] = u32(pooling)
    if dims["q"] != dims["hidden"]:
        keys["vision.attention.head_dim"] = u32(dims["head_dim"])
    if _has_ears(wrapper):
        keys |= {
            "audio.projector_type": text("gemma4a"),
            "has_audio_encoder": boolean(True),
            "audio.projection_dim": u32(dims["width"]),
            "audio.embedding_length": u32(dims["a_hidden"]),
            "audio.feed_forward_length": u32(dims["a_ff"]),
            "audio.block_count": u32(dims["a_layers"]),
            "audio.attention.head_count": u32(dims["a_heads"]),
            "audio.num_mel_bins": u32(dims["a_bands"]),
            "audio.attention.layer_norm_epsilon": f32(number(_audio(wrapper), "rms_norm_eps")),
        }
    return keys


GEMMA4 = Tower(
    own=r"(vision_tower|audio_tower|embed_vision|embed_audio)\.",
    read_dims=_dims,
    read_rules=_rules,
    to_keys=_keys,
    renames=((r"^model\.(vision_tower|audio_tower|embed_vision|embed_audio)\.", r"\1."),),
)
