"""Text models inside of image and audio models, found by their configuration alone.

Each is a tiny model of the wrapper's class, of which llama.cpp gets the text model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_models import read_config, write_model
from support.tiny.base import BASE, EXPERTS, LAYER_NORM, MROPE, VISION, VOCAB, Tiny
from support.tiny_models import MODELS, build

from quantcli.archs import find_architecture

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("llama_cpp")

F32_BOUND = 1e-3

_WHISPER = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "num_mel_bins": 8,
}  # fmt: skip
_QWEN_AUDIO = _WHISPER | {"output_dim": 64}
_DEEP = VISION | {"depth": 1, "out_hidden_size": 64, "num_heads": 2}
_LFM2 = {key: value for key, value in BASE.items() if key != "rms_norm_eps"} | {
    "norm_eps": 0.01, "block_multiple_of": 32, "layer_types": ["conv", "full_attention"],
    "tie_word_embeddings": True,
}  # fmt: skip
_COHERE = LAYER_NORM | {
    "layer_norm_eps": 0.01, "num_hidden_layers": 4, "sliding_window": 16, "logit_scale": 0.25,
    "tie_word_embeddings": True,
}  # fmt: skip
_IMAGE = {"image_token_index": VOCAB - 1}


def _text(kind: str, **settings: Any) -> dict[str, Any]:
    return {"text_config": BASE | {"model_type": kind} | settings}


WRAPPERS = {
    "qwen2-audio": Tiny(
        "Qwen2AudioForConditionalGeneration",
        _text("qwen2") | {"audio_config": _WHISPER | {"max_source_positions": 16}}
        | {"audio_token_index": VOCAB - 1},
    ),
    "voxtral": Tiny(
        "VoxtralForConditionalGeneration",
        _text("llama") | {
            "audio_config": {
                "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 16,
            },
            "audio_token_id": VOCAB - 1,
        },
    ),
    "idefics3": Tiny(
        "Idefics3ForConditionalGeneration",
        _text("llama") | {"vision_config": VISION, "image_token_id": VOCAB - 1, "scale_factor": 2}
        | {"tie_word_embeddings": False},
    ),
    "smolvlm": Tiny(
        "SmolVLMForConditionalGeneration",
        _text("llama") | {"vision_config": VISION, "image_token_id": VOCAB - 1, "scale_factor": 2}
        | {"tie_word_embeddings": False},
    ),
    "internvl": Tiny(
        "InternVLForConditionalGeneration",
        _text("qwen2")
        | {"vision_config": VISION | {"image_size": [28, 28], "patch_size": [14, 14]}}
        | {"image_token_id": VOCAB - 1},
    ),
    "janus": Tiny(
        "JanusForConditionalGeneration",
        _text("llama") | {
            "vision_config": VISION | {"num_image_tokens": 4, "projection_dim": 64},
            "image_token_id": VOCAB - 1,
            "vq_config": {
                "embed_dim": 8, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32,
                "channel_multiplier": [1, 1], "num_res_blocks": 1, "image_token_embed_dim": 64,
                "projection_dim": 32, "num_patches": 4,
            },
        },
    ),
    "exaone4.5": Tiny(
        "Exaone4_5_ForConditionalGeneration",
        _text("exaone4", sliding_window=None, layer_types=["full_attention"] * 2)
        | {"vision_config": _DEEP | {"num_key_value_heads": 2}}
        | {"image_token_id": VOCAB - 1, "video_token_id": VOCAB - 2},
        config_class="Exaone4_5_Config",
    ),
    "llava-next": Tiny(
        "LlavaNextForConditionalGeneration",
        _text("mistral", sliding_window=None) | _IMAGE
        | {"vision_config": VISION | {"model_type": "clip_vision_model"}},
    ),
    "llava-onevision": Tiny(
        "LlavaOnevisionForConditionalGeneration",
        _text("qwen2") | _IMAGE
        | {"vision_config": VISION | {"model_type": "siglip_vision_model"}}
        | {"video_token_index": VOCAB - 2},
    ),
    "lfm2-vl": Tiny(
        "Lfm2VlForConditionalGeneration",
        {"text_config": _LFM2 | {"model_type": "lfm2"}, "image_token_id": VOCAB - 1}
        | {"vision_config": VISION | {"model_type": "siglip2_vision_model", "num_patches": 4}}
        | {"downsample_factor": 1, "projector_hidden_size": 32},
    ),
    "qwen3-asr": Tiny(
        "Qwen3ASRForConditionalGeneration",
        _text("qwen3", head_dim=16) | {"audio_token_id": VOCAB - 1}
        | {"audio_config": _QWEN_AUDIO | {"downsample_hidden_size": 8}},
    ),
    "qwen2.5-omni": Tiny(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        _text("qwen2_5_omni_text", rms_norm_eps=1e-6, rope_parameters=MROPE) | {
            "vision_config": _DEEP,
            "audio_config": _QWEN_AUDIO | {"max_source_positions": 16},
            "audio_token_index": VOCAB - 1,
            "image_token_index": VOCAB - 2,
            "video_token_index": VOCAB - 3,
        },
        config_class="Qwen2_5OmniThinkerConfig",
    ),
    "qwen3-omni": Tiny(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        _text(
            "qwen3_omni_moe_text", head_dim=16, num_experts=4, moe_intermediate_size=32,
            rope_parameters=MROPE, **EXPERTS,
        ) | {
            "vision_config": _DEEP
            | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            "audio_config": _QWEN_AUDIO | {"downsample_hidden_size": 8},
            "audio_token_id": VOCAB - 1,
            "image_token_id": VOCAB - 2,
            "video_token_id": VOCAB - 3,
        },
        config_class="Qwen3OmniMoeThinkerConfig",
    ),
    "aya-vision": Tiny(
        "AyaVisionForConditionalGeneration",
        {"text_config": _COHERE | {"model_type": "cohere2"}, "downsample_factor": 1} | _IMAGE
        | {"vision_config": VISION | {"model_type": "siglip_vision_model"}},
    ),
}  # fmt: skip


@pytest.fixture(params=WRAPPERS, scope="module")
def wrapped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A wrapper's class, and a checkpoint of it."""
    tiny = WRAPPERS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, request.param, tiny)
        return tiny.model, build(request.param, tmp_path_factory.mktemp("wrapper") / "m")


def test_logits_of_the_text_model(wrapped: tuple[str, Path], tmp_path: Path) -> None:
    from support.llama_logits import llama_logits

    model_class, folder = wrapped
    tokens = np.random.default_rng(0).integers(2, 4000, 48).tolist()
    found = llama_logits(write_model(folder, tmp_path / "m.gguf", dtype="F32"), tokens)
    model = getattr(transformers, model_class).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    assert expected.std() > 1, "flat logits would hide a fault"
    if "AyaVision" in model_class:
        # A remark says so: the class leaves out what its text model alone multiplies by.
        expected = expected * _COHERE["logit_scale"]
    assert np.abs(found - expected).max() / expected.std() < F32_BOUND


def test_a_scale_that_transformers_leaves_out_is_said(wrapped: tuple[str, Path]) -> None:
    model_class, folder = wrapped
    config = read_config(folder)
    notes = find_architecture(config).notes(config)
    assert any("leaves logit_scale out" in note for note in notes) == ("AyaVision" in model_class)


def test_a_model_that_also_speaks_holds_its_text_model_deeper() -> None:
    text = BASE | {"model_type": "qwen2_5_omni_text", "rms_norm_eps": 1e-6}
    text |= {"rope_parameters": MROPE}
    outer = {"architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni"}
    inner = {**outer, "text_config": text}
    deeper = {**outer, "thinker_config": {"text_config": text}, "talker_config": {"hidden_size": 8}}
    assert find_architecture(deeper).metadata(deeper) == find_architecture(inner).metadata(inner)
    renames = find_architecture(deeper).renames
    assert (r"^thinker\.", "") in renames
