"""Text models inside of others: image and audio wrappers, bare decoders without a head.

A wrapper's config.json holds the text model's as ``text_config``; its tensors lie below
``language_model`` in one of several spellings, and the towers beside it are left out. A class such
as ``Qwen3Model`` is the decoder of ``Qwen3ForCausalLM``, whose head is then not there, and whose
tensors may lack the prefix "model.".
"""

from __future__ import annotations

import re
from dataclasses import replace

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, text_part
from quantcli.registry import Registry

RENAMES = (
    (r"^thinker\.", ""),
    (r"^(model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?(language_model|text_model|decoder)\.(model\.)?", "model."),
)
TOWERS = (
    r"(model\.)?(visual|vision_\w+|image_\w+|audio_\w+|embed_vision|embed_audio|vit|sam_\w+"
    r"|multi_modal_projector|mm_projector|multimodal_projector|projector|connector|aligner|mlp1"
    r"|modality_projection|resampler|patch_merger|perceiver\w*|talker|token2wav|code2wav|vqmodel"
    r"|generation_\w+)(\..*)?",
)
"""Tensors of vision and audio towers, of what joins them to the text model, and of what speaks or
draws."""

_CLASSES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "qwen2_5_omni_text": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_omni_moe_text": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
"""The text model's class by ``model_type``, where it is not the same word in capitals."""


def text_class(config: Config, name: str, known: Registry) -> str | None:
    """The class among ``known`` of the text model in a model of class ``name``, or None."""
    inner = text_part(config)
    if inner:
        named = inner.get("architectures")
        candidates = [named[0]] if isinstance(named, list) and named else []
        kind = str(inner.get("model_type", "llama"))
        candidates += [_CLASSES.get(kind, ""), _capitals(kind) + "ForCausalLM"]
    else:
        stem = re.sub(r"(Text)?Model$", "", name)
        candidates = [f"{stem}ForCausalLM", f"{stem}LMHeadModel"] if stem != name else []
    return next((found for found in candidates if found in known), None)


def _capitals(kind: str) -> str:
    """ "qwen3_moe" as "Qwen3Moe"."""
    return "".join(part.capitalize() for part in kind.removesuffix("_text").split("_"))


def plain_name(name: str) -> str:
    """A wrapper's tensor as its text model calls it."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def unwrapped(family: Architecture) -> Architecture:
    """The family where it is the text part of a wrapper."""
    return replace(
        family,
        renames=(*RENAMES, *family.renames),
        ignored=(*family.ignored, *TOWERS),
    )


def headless(family: Architecture) -> Architecture:
    """The family without an output matrix, as a decoder that makes embeddings has none."""
    return replace(family, tied=True)
