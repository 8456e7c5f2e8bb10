"""The text model of PaddleOCR-VL: ERNIE 4.5 that rotates halves, in sections; "paddleocr".

Sources: arXiv:2510.14528, transformers' modeling_paddleocr_vl.py, llama.cpp's
src/models/paddleocr.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quantcli.archs.config import Config
from quantcli.archs.decoder import decoder_config, decoder_keys
from quantcli.archs.ernie4_5 import ERNIE4_5
from quantcli.archs.header import Header
from quantcli.archs.rope import read_rope, rope_keys, section_config, section_keys
from quantcli.archs.rules import Dims
from quantcli.archs.wrappers import unwrapped
from quantcli.types import MetaValue

_NO_TOWER = {
    "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
}  # fmt: skip
"""Of a model without images: the class has a tower in any case."""


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    rope = read_rope(config, ("default", "mrope"), sections=True)
    return {
        **decoder_keys(config, dims),
        **rope_keys({**rope, "rope_type": "default"}),
        **section_keys({"mrope_section": [16, 24, 24], **rope}, dims["head_dim"] // 2),
    }


def _config(header: Header) -> dict[str, Any]:
    text = decoder_config(header, "PaddleOCRVLForConditionalGeneration", "paddleocr_vl_text")
    text["rope_parameters"] |= section_config(header)
    return {
        "architectures": text.pop("architectures"),
        "model_type": "paddleocr_vl",
        "text_config": text | {"vocab_size": header.shapes["token_embd.weight"][0]},
        "vision_config": _NO_TOWER,
    }


PADDLEOCR = replace(
    unwrapped(ERNIE4_5),
    name="paddleocr",
    to_keys=_keys,
    to_config=_config,
    renames=((r"^mlp_AR\.", "projector."), *unwrapped(ERNIE4_5).renames),
)
