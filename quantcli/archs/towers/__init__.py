"""Vision and audio towers beside a text model: one family, one file."""

from quantcli.archs.config import Config, class_name
from quantcli.archs.towers.base import CLIP, Tower, Wrapper
from quantcli.errors import ArchitectureError
from quantcli.registry import Registry

TOWERS = Registry(
    "tower",
    "towers",
    {
        "Gemma3ForConditionalGeneration": "quantcli.archs.towers.siglip:GEMMA3",
        "Gemma4ForConditionalGeneration": "quantcli.archs.towers.gemma4:GEMMA4",
        "Idefics3ForConditionalGeneration": "quantcli.archs.towers.siglip:IDEFICS3",
        "SmolVLMForConditionalGeneration": "quantcli.archs.towers.siglip:IDEFICS3",
        "Qwen2VLForConditionalGeneration": "quantcli.archs.towers.qwen_vl:QWEN2_VL",
        "Qwen2_5_VLForConditionalGeneration": "quantcli.archs.towers.qwen_vl:QWEN2_5_VL",
        "Qwen3VLForConditionalGeneration": "quantcli.archs.towers.qwen3_vl:QWEN3_VL",
        "Qwen3VLMoeForConditionalGeneration": "quantcli.archs.towers.qwen3_vl:QWEN3_VL",
        "Qwen3_5ForConditionalGeneration": "quantcli.archs.towers.qwen3_vl:QWEN3_VL",
        "Qwen3_5MoeForConditionalGeneration": "quantcli.archs.towers.qwen3_vl:QWEN3_VL",
        "Mistral3ForConditionalGeneration": "quantcli.archs.towers.pixtral:PIXTRAL",
        "LlavaForConditionalGeneration": "quantcli.archs.towers.llava:LLAVA",
        "LlavaNextForConditionalGeneration": "quantcli.archs.towers.llava:LLAVA_NEXT",
        "LlavaForConditionalGeneration/pixtral": "quantcli.archs.towers.pixtral:PIXTRAL",
        "LightOnOcrForConditionalGeneration": "quantcli.archs.towers.pixtral:LIGHTON_OCR",
        "Glm4vForConditionalGeneration": "quantcli.archs.towers.glm4v:GLM4V",
        "Glm4vMoeForConditionalGeneration": "quantcli.archs.towers.glm4v:GLM4V",
        "Exaone4_5_ForConditionalGeneration": "quantcli.archs.towers.exaone4_5:EXAONE4_5",
        "GlmOcrForConditionalGeneration": "quantcli.archs.towers.glm4v:GLM_OCR",
        "PaddleOCRVLForConditionalGeneration": "quantcli.archs.towers.paddleocr:PADDLEOCR_VL",
        "JanusForConditionalGeneration": "quantcli.archs.towers.janus:JANUS",
        "InternVLForConditionalGeneration": "quantcli.archs.towers.internvl:INTERNVL",
        "InternVLChatModel": "quantcli.archs.towers.internvl:INTERNVL",
        "Lfm2VlForConditionalGeneration": "quantcli.archs.towers.lfm2_vl:LFM2_VL",
        "Llama4ForConditionalGeneration": "quantcli.archs.towers.llama4:LLAMA4",
        "Qwen2AudioForConditionalGeneration": "quantcli.archs.towers.whisper:QWEN2_AUDIO",
        "Qwen3ASRForConditionalGeneration": "quantcli.archs.towers.qwen3_asr:QWEN3_ASR",
        "AudioFlamingo3ForConditionalGeneration": "quantcli.archs.towers.whisper:AUDIO_FLAMINGO3",
    },
)
"""By the class name in config.json's "architectures", and where a class has several by its
vision_config's "model_type" behind it."""


def find_tower(config: Config) -> Tower:
    """The tower of the wrapper that ``config`` (config.json) describes.

    Raises ArchitectureError when its class has none that is known.
    """
    name = _line(config)
    if name not in TOWERS:
        raise ArchitectureError(
            f"{class_name(config)} has no vision or audio tower that quantcli knows",
            hint="llama.cpp's convert_hf_to_gguf.py --mmproj may write it; then 'quantcli "
            "quantize' that GGUF",
        )
    found: Tower = TOWERS.get(name)
    return found


def has_tower(config: Config) -> bool:
    """Whether there is a tower that is known beside the text model."""
    return bool(config.get("architectures")) and _line(config) in TOWERS


def _line(config: Config) -> str:
    """The name of the registry's line, if there is one."""
    name, section = class_name(config), config.get("vision_config")
    kind = section.get("model_type") if isinstance(section, dict) else None
    return f"{name}/{kind}" if f"{name}/{kind}" in TOWERS else name


__all__ = ["CLIP", "TOWERS", "Tower", "Wrapper", "find_tower", "has_tower"]
