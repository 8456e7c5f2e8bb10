"""Tiny wrappers with random weights, one for each tower, and what transformers makes of images.

Every wrapper's text model is 64 wide and has the tokenizer of tests/data/bookworm-mini. Images have
the size that a tower takes without resizing, so that both sides see the same pixels.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support.tiny.base import BASE, GEMMA, GEMMA3, LAYER_NORM, MROPE, VOCAB

TOKENIZER = Path(__file__).parent.parent / "data" / "bookworm-mini"
NORMALISATION = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.4, 0.3]}
WIDTH = 64

_VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 64,
    "patch_size": 8,
}
_QWEN = {"depth": 3, "hidden_size": 48, "intermediate_size": 80, "num_heads": 2, "patch_size": 8}
_IMAGE_TOKENS = {
    "image_token_id": VOCAB - 1,
    "video_token_id": VOCAB - 2,
    "vision_start_token_id": VOCAB - 3,
}
_LLAMA = BASE | {"model_type": "llama", "pad_token_id": 0}
_LFM2 = LAYER_NORM | {
    "model_type": "lfm2",
    "norm_eps": 0.01,
    "block_multiple_of": 32,
    "layer_types": ["conv", "full_attention"],
}
_GEMMA4 = {
    "text_config": {key: value for key, value in GEMMA.items() if key != "rope_parameters"}
    | {"global_head_dim": 32, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    | {"layer_types": ["sliding_attention", "full_attention"]}
    | {"vocab_size_per_layer_input": VOCAB},
    "vision_config": {key: value for key, value in _VISION.items() if key != "image_size"}
    | {"num_key_value_heads": 3, "head_dim": 16, "position_embedding_size": 64}
    | {"use_clipped_linears": True, "standardize": True, "rms_norm_eps": 1e-3},
    "audio_config": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"output_proj_dims": 48, "subsampling_conv_channels": [128, 8]},
    "image_token_id": VOCAB - 1,
    "audio_token_id": VOCAB - 2,
}
_MISTRAL = BASE | {"model_type": "mistral", "sliding_window": None}

Pixels = NDArray[np.uint8]
Look = Callable[[Any, Any], Any]
"""What a model of transformers makes of an image or a sound: embeddings (tokens, width)."""


def normalised(pixels: Pixels) -> Any:
    """Pixels as the towers take them: (1, 3, rows, columns)."""
    import torch

    mean, std = (torch.tensor(NORMALISATION[key]) for key in ("image_mean", "image_std"))
    return ((torch.tensor(pixels).float() / 255 - mean) / std).permute(2, 0, 1)[None]


def _rows(found: Any) -> Any:
    """The embeddings in a model's answer, one row for each token."""
    import torch

    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, list | tuple) else [found]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def plain(model: Any, pixels: Pixels) -> Any:
    """One image, one call."""
    holder = model if hasattr(model, "get_image_features") else model.model
    return _rows(holder.get_image_features(normalised(pixels)))


def tiled(model: Any, pixels: Pixels) -> Any:
    """Image processors that cut images into tiles give one more axis."""
    return _rows(model.get_image_features(normalised(pixels)[None]))


def class_last(model: Any, pixels: Pixels) -> Any:
    """As llama.cpp has it: the class token behind the patches, which take its position and on."""
    embeddings = model.model.vision_tower.embeddings
    embeddings.position_embeddings.copy_(embeddings.position_embeddings.roll(1, dims=1))
    return plain(model, pixels)


def class_kept(model: Any, pixels: Pixels) -> Any:
    """The same for LLaVA around CLIP, where llama.cpp then drops the first patch, not the class."""
    import torch

    tower = model.model.vision_tower
    positions = tower.embeddings.position_embedding.weight
    positions.copy_(positions.roll(1, dims=0))
    found = tower(normalised(pixels), output_hidden_states=True)
    states = found.hidden_states[model.config.vision_feature_layer]
    taken = torch.cat([states[:, 2:], states[:, :1]], dim=1)
    return _rows(model.model.multi_modal_projector(taken))


def projected(model: Any, pixels: Pixels) -> Any:
    """Llama 4's features through its projector, in llama.cpp's order: column by column."""
    found = model.get_image_features(normalised(pixels), vision_feature_select_strategy="default")
    rows = _rows(model.multi_modal_projector(_rows(found.last_hidden_state)))
    side = math.isqrt(len(rows))
    return rows.reshape(side, side, -1).transpose(0, 1).reshape(rows.shape)


def rows_of_pixels(model: Any, pixels: Pixels) -> Any:
    """LFM2-VL's patches: one row each, colours last."""
    import torch

    patch = model.config.vision_config.patch_size
    high, wide = (side // patch for side in pixels.shape[:2])
    image = normalised(pixels)[0].reshape(3, high, patch, wide, patch)
    found = model.get_image_features(
        pixel_values=image.permute(1, 3, 2, 4, 0).reshape(1, high * wide, -1),
        spatial_shapes=torch.tensor([[high, wide]]),
        pixel_attention_mask=torch.ones(1, high * wide, dtype=torch.long),
    )
    return _rows(found)


def flattened(model: Any, pixels: Pixels) -> Any:
    """Qwen's patches: pairs of frames, squares of two by two patches together."""
    import torch

    patch, merge = model.config.vision_config.patch_size, 2
    image = normalised(pixels)[0].numpy()
    high, wide = image.shape[1] // patch, image.shape[2] // patch
    frames = np.stack([image, image]).reshape(
        2, 3, high // merge, merge, patch, wide // merge, merge, patch
    )
    flat = frames.transpose(2, 5, 3, 6, 1, 0, 4, 7).reshape(high * wide, -1)
    grid = torch.tensor([[1, high, wide]])
    found = model.get_image_features(torch.tensor(flat), grid)
    taps = getattr(found, "deepstack_features", None) or []
    return torch.cat([_rows(found), *map(_rows, taps)], dim=-1)


def sized(model: Any, pixels: Pixels) -> Any:
    """One image and its size."""
    import torch

    sizes = torch.tensor([pixels.shape[:2]])
    return _rows(model.get_image_features(normalised(pixels), image_sizes=sizes))


def patched(model: Any, pixels: Pixels) -> Any:
    """PaddleOCR-VL's patches, row by row, and their grid."""
    import torch

    patch = model.config.vision_config.patch_size
    high, wide = (side // patch for side in pixels.shape[:2])
    image = normalised(pixels)[0].reshape(3, high, patch, wide, patch)
    grid = torch.tensor([[1, high, wide]])
    return _rows(model.get_image_features(image.permute(1, 3, 0, 2, 4).flatten(0, 1), grid))


def overviewed(model: Any, pixels: Pixels) -> Any:
    """The small picture of the whole image, which comes before its tiles."""
    import torch

    found = model.model.vision_tower(normalised(pixels), output_hidden_states=True).hidden_states
    taken = [found[layer] for layer in model.config.vision_feature_layer]
    return _rows(model.model.multi_modal_projector(torch.cat(taken, dim=-1)))


def broken(model: Any, pixels: Pixels) -> Any:
    """Pixtral's rows of tokens, with the embedding of [IMG_BREAK] between them."""
    import torch

    sizes, found = torch.tensor([pixels.shape[:2]]), sized(model, pixels)
    merge = getattr(model.config, "spatial_merge_size", 1)
    high, wide = (side // model.config.vision_config.patch_size // merge for side in sizes[0])
    end = model.get_input_embeddings().weight[BREAK].expand(int(high), 1, -1)
    lines = torch.cat([found.reshape(high, wide, -1), end], dim=1)
    return lines.reshape(-1, lines.shape[-1])[:-1]


def heard(model: Any, samples: NDArray[np.float32]) -> Any:
    """Up to 30 seconds of sound through Whisper's spectrogram, encoder and the projector."""
    import torch
    from transformers import WhisperFeatureExtractor

    bands = model.config.audio_config.num_mel_bins
    found = WhisperFeatureExtractor(feature_size=bands)(
        samples, sampling_rate=16000, return_tensors="pt"
    )["input_features"]
    tower = model.model.audio_tower
    whole = {"input_features_mask": torch.ones(1, found.shape[-1], dtype=torch.long)}
    masked = "input_features_mask" in inspect.signature(tower.forward).parameters
    states = tower(found, **(whole if masked else {})).last_hidden_state
    return _rows(model.model.multi_modal_projector(states))


def transcribed(model: Any, samples: NDArray[np.float32]) -> Any:
    """The first eight seconds, which are encoded at a time, through Qwen3-ASR's encoder."""
    import torch
    from transformers import WhisperFeatureExtractor

    found = WhisperFeatureExtractor(feature_size=model.config.audio_config.num_mel_bins)(
        samples, sampling_rate=16000, return_tensors="pt", padding=False
    )["input_features"]
    mask = torch.ones(1, found.shape[-1], dtype=torch.long)
    states = model.model.audio_tower(found, mask).last_hidden_state
    return _rows(model.model.multi_modal_projector(states))[: 8 * 13]


LIMITS = {"input_max": 2.5, "input_min": -2.0, "output_max": 2.0, "output_min": -3.0}
"""Where Gemma 4's linear layers clamp."""


def placed(model: Any, pixels: Pixels) -> Any:
    """Gemma 4's patches: one row each, colours last, with their places across and down."""
    import torch

    patch = model.config.vision_config.patch_size
    high, wide = (side // patch for side in pixels.shape[:2])
    image = (torch.tensor(pixels).float() / 255).permute(2, 0, 1)
    image = image.reshape(3, high, patch, wide, patch)
    places = torch.stack(
        [torch.arange(wide).repeat(high), torch.arange(high).repeat_interleave(wide)], dim=-1
    )
    rows = image.permute(1, 3, 2, 4, 0).reshape(1, high * wide, -1)
    return _rows(model.get_image_features(rows, image_position_ids=places[None]))


def overheard(model: Any, samples: NDArray[np.float32]) -> Any:
    """A sound through Gemma 4's spectrogram, conformer and projection."""
    import torch
    from transformers import Gemma4AudioFeatureExtractor

    extractor = Gemma4AudioFeatureExtractor()
    found = extractor([samples], return_tensors="pt", pad_to_multiple_of=None)
    frames = found["input_features"]
    mask = torch.ones(frames.shape[:2], dtype=torch.bool)
    return _rows(model.model.get_audio_features(frames, mask))


EARS = (heard, overheard, transcribed)
"""Those that hear."""

BREAK = 9
"""The token that stands for [IMG_BREAK] here."""


@dataclass(frozen=True)
class TinyTower:
    """A wrapper of transformers: class, configuration, processor's settings, image, features."""

    model: str
    config: dict[str, Any]
    image: tuple[int, int]
    """Rows and columns of pixels; for an ear, seconds and samples a second."""
    look: Look = plain
    processor: dict[str, Any] = field(default_factory=dict)
    token: str = ""
    """A token that the tokenizer has at the place of `BREAK`."""
    towered: str = ""
    """The line of the registry, if it is not the class."""


TINY: dict[str, TinyTower] = {
    "gemma3": TinyTower(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": GEMMA3 | {"model_type": "gemma3_text"},
            "vision_config": _VISION | {"image_size": 56, "patch_size": 7, "layer_norm_eps": 1e-3},
            "mm_tokens_per_image": 16,
            "boi_token_index": VOCAB - 3,
            "eoi_token_index": VOCAB - 2,
            "image_token_index": VOCAB - 1,
        },
        (56, 56),
    ),
    "idefics3": TinyTower(
        "Idefics3ForConditionalGeneration",
        {"text_config": _LLAMA, "vision_config": _VISION, "image_token_id": VOCAB - 1},
        (64, 64),
        tiled,
        {"size": {"longest_edge": 64}},
    ),
    "smolvlm": TinyTower(
        "SmolVLMForConditionalGeneration",
        {
            "text_config": _LLAMA,
            "vision_config": _VISION | {"layer_norm_eps": 1e-3},
            "image_token_id": VOCAB - 1,
            "scale_factor": 4,
        },
        (64, 64),
        tiled,
        {"size": {"longest_edge": 64}},
    ),
    "qwen2-vl": TinyTower(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": BASE | {"rope_parameters": MROPE, "rms_norm_eps": 1e-6},
            "vision_config": _QWEN | {"embed_dim": 48, "hidden_size": WIDTH, "mlp_ratio": 2},
            **_IMAGE_TOKENS,
        },
        (64, 96),
        flattened,
    ),
    "qwen2.5-vl": TinyTower(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": BASE | {"rope_parameters": MROPE, "rms_norm_eps": 1e-6},
            "vision_config": _QWEN
            | {"depth": 4, "out_hidden_size": WIDTH, "patch_size": 14, "window_size": 112}
            | {"fullatt_block_indexes": [1, 3]},
            **_IMAGE_TOKENS,
        },
        (224, 336),
        flattened,
    ),
    "exaone4.5": TinyTower(
        "Exaone4_5_ForConditionalGeneration",
        {
            "text_config": BASE | {"model_type": "exaone4"},
            "vision_config": _QWEN
            | {"depth": 4, "num_heads": 4, "num_key_value_heads": 2, "hidden_size": 96}
            | {"out_hidden_size": WIDTH, "patch_size": 14, "window_size": 112}
            | {"fullatt_block_indexes": [1, 3]},
            **_IMAGE_TOKENS,
        },
        (224, 336),
        flattened,
        {"min_pixels": 1024, "max_pixels": 100_000},
    ),
    "qwen3-vl": TinyTower(
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": BASE | {"head_dim": 16, "rope_parameters": MROPE},
            "vision_config": _QWEN
            | {"out_hidden_size": WIDTH, "num_position_embeddings": 64}
            | {"deepstack_visual_indexes": [0, 2]},
            **_IMAGE_TOKENS,
        },
        (64, 96),
        flattened,
    ),
    "pixtral": TinyTower(
        "LlavaForConditionalGeneration",
        {
            "text_config": _MISTRAL,
            "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 16},
            "image_token_index": VOCAB - 1,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        (64, 48),
        broken,
        token="[IMG_BREAK]",
        towered="LlavaForConditionalGeneration/pixtral",
    ),
    "mistral3": TinyTower(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": _MISTRAL,
            "vision_config": _VISION
            | {"model_type": "pixtral", "head_dim": 16, "hidden_act": "silu"},
            "image_token_index": VOCAB - 1,
        },
        (64, 96),
        broken,
        token="[IMG_BREAK]",
    ),
    "llava": TinyTower(
        "LlavaForConditionalGeneration",
        {
            "text_config": _LLAMA,
            "vision_config": _VISION | {"model_type": "clip_vision_model", "num_hidden_layers": 3},
            "image_token_index": VOCAB - 1,
        },
        (64, 64),
        class_kept,
    ),
    "internvl": TinyTower(
        "InternVLForConditionalGeneration",
        {
            "text_config": BASE | {"model_type": "qwen2"},
            "vision_config": _VISION | {"image_size": [64, 64], "patch_size": [8, 8]},
            "image_token_id": VOCAB - 1,
        },
        (64, 64),
        class_last,
    ),
    "internvl-biased": TinyTower(
        "InternVLForConditionalGeneration",
        {
            "text_config": BASE | {"model_type": "qwen2"},
            "vision_config": _VISION | {"attention_bias": True},
            "image_token_id": VOCAB - 1,
        },
        (64, 64),
        class_last,
        {"min_patches": 1, "max_patches": 2},
    ),
    "lfm2-vl": TinyTower(
        "Lfm2VlForConditionalGeneration",
        {
            "text_config": _LFM2,
            "vision_config": {key: value for key, value in _VISION.items() if key != "image_size"}
            | {"patch_size": 16, "num_patches": 256},
            "projector_hidden_size": 72,
            "image_token_id": VOCAB - 1,
        },
        (256, 256),
        rows_of_pixels,
    ),
    "llama4": TinyTower(
        "Llama4ForConditionalGeneration",
        {
            "text_config": BASE
            | {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 2},
            "vision_config": _VISION
            | {"intermediate_size": 192, "vision_output_dim": 40, "projector_input_dim": 40}
            | {"projector_output_dim": 40},
            "image_token_index": VOCAB - 1,
        },
        (64, 64),
        projected,
    ),
    "qwen2-audio": TinyTower(
        "Qwen2AudioForConditionalGeneration",
        {
            "text_config": BASE | {"model_type": "qwen2"},
            "audio_config": {"d_model": 48, "encoder_layers": 2, "encoder_attention_heads": 3}
            | {"encoder_ffn_dim": 80, "num_mel_bins": 80},
            "audio_token_index": VOCAB - 1,
        },
        (20, 16000),
        heard,
    ),
    "audio-flamingo3": TinyTower(
        "AudioFlamingo3ForConditionalGeneration",
        {
            "text_config": BASE | {"model_type": "qwen2"},
            "audio_config": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
            | {"intermediate_size": 80, "num_mel_bins": 80},
            "audio_token_id": VOCAB - 1,
        },
        (20, 16000),
        heard,
    ),
    "qwen3-asr": TinyTower(
        "Qwen3ASRForConditionalGeneration",
        {
            "text_config": BASE | {"model_type": "qwen3", "head_dim": 16},
            "audio_config": {"d_model": 48, "encoder_layers": 2, "encoder_attention_heads": 3}
            | {"encoder_ffn_dim": 80, "downsample_hidden_size": 20, "output_dim": WIDTH},
            "audio_token_id": VOCAB - 1,
        },
        (9, 16000),
        transcribed,
    ),
    "gemma4": TinyTower(
        "Gemma4ForConditionalGeneration",
        _GEMMA4,
        (240, 192),
        placed,
        {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]},
    ),
    "gemma4-ears": TinyTower(
        "Gemma4ForConditionalGeneration",
        _GEMMA4,
        (4, 16000),
        overheard,
    ),
    "lighton-ocr": TinyTower(
        "LightOnOcrForConditionalGeneration",
        {
            "text_config": BASE | {"model_type": "qwen3", "head_dim": 16},
            "vision_config": _VISION | {"head_dim": 16, "hidden_act": "silu"},
            "image_token_id": VOCAB - 1,
        },
        (64, 48),
        sized,
        {"size": {"longest_edge": 64}},
    ),
    "glm4v": TinyTower(
        "Glm4vForConditionalGeneration",
        {
            "text_config": BASE | {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
            "vision_config": _QWEN | {"image_size": 64, "out_hidden_size": WIDTH},
            "image_token_id": VOCAB - 1,
        },
        (64, 64),
        flattened,
    ),
    "paddleocr-vl": TinyTower(
        "PaddleOCRVLForConditionalGeneration",
        {
            "text_config": BASE | {"rope_parameters": MROPE},
            "vision_config": _VISION | {"num_attention_heads": 2},
            "image_token_id": VOCAB - 1,
        },
        (64, 64),
        patched,
        {"min_pixels": 1024, "max_pixels": 65536},
    ),
    "glm-ocr": TinyTower(
        "GlmOcrForConditionalGeneration",
        {
            "text_config": BASE
            | {"head_dim": 16, "rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
            "vision_config": _QWEN | {"out_hidden_size": WIDTH, "rms_norm_eps": 1e-3},
            "image_token_id": VOCAB - 1,
        },
        (64, 96),
        flattened,
    ),
    "janus": TinyTower(
        "JanusForConditionalGeneration",
        {
            "text_config": _LLAMA,
            "vision_config": _VISION
            | {"mlp_ratio": 1.5, "projection_dim": WIDTH, "num_image_tokens": 64},
        },
        (64, 64),
    ),
    "granite-vision": TinyTower(
        "LlavaNextForConditionalGeneration",
        {
            "text_config": _LLAMA,
            "vision_config": _VISION
            | {"model_type": "siglip_vision_model", "num_hidden_layers": 4},
            "image_token_index": VOCAB - 1,
            "image_grid_pinpoints": [[64, 128], [128, 64]],
            "vision_feature_layer": [-4, -1],
            "vision_feature_select_strategy": "full",
        },
        (64, 64),
        overviewed,
    ),
    "llava-siglip": TinyTower(
        "LlavaForConditionalGeneration",
        {
            "text_config": _LLAMA,
            "vision_config": _VISION | {"model_type": "siglip_vision_model"},
            "image_token_index": VOCAB - 1,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "full",
        },
        (64, 64),
    ),
}


def build(name: str, folder: Path, changes: Mapping[str, Any] | None = None) -> Any:
    """Write the checkpoint of ``TINY[name]`` into ``folder``, in float32; returns the model.

    ``changes`` replaces settings of its configuration.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tiny = TINY[name]
    config_class = getattr(transformers, tiny.model.replace("ForConditionalGeneration", "Config"))
    config = config_class(**copy.deepcopy(tiny.config | dict(changes or {})))
    model = getattr(transformers, tiny.model)(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for label, weight in model.named_parameters():
            weight.copy_(_draw(label, weight, generator))
        for label, limit in model.named_buffers():
            kind = label.rpartition(".")[2]
            if kind in LIMITS:
                limit.fill_(LIMITS[kind])
    model.save_pretrained(folder)
    _write_tokenizer(folder, tiny.token)
    settings = NORMALISATION | tiny.processor
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def _draw(label: str, weight: Any, generator: Any) -> Any:
    import torch

    noise = torch.randn(weight.shape, generator=generator)
    if label.endswith("bias"):
        return 0.2 * noise
    if weight.ndim == 1:
        return weight.round() + 0.2 * noise
    if "embed" in label:
        return 0.5 * noise
    return 1.5 / math.sqrt(weight[0].numel()) * noise


def _write_tokenizer(folder: Path, token: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder / file)
    if token:
        path = folder / "tokenizer.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = settings["model"]["vocab"]
        old = next(piece for piece, number in vocabulary.items() if number == BREAK)
        del vocabulary[old]
        settings["model"]["merges"] = [
            pair
            for pair in settings["model"]["merges"]
            if old not in (pair if isinstance(pair, list) else pair.split())
            and "".join(pair if isinstance(pair, list) else pair.split()) in vocabulary
        ]
        vocabulary[token] = BREAK
        added = {"id": BREAK, "content": token, "special": True, "normalized": False}
        added |= {"single_word": False, "lstrip": False, "rstrip": False}
        settings["added_tokens"].append(added)
        path.write_text(json.dumps(settings), encoding="utf-8")
