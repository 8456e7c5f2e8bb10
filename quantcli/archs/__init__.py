"""What a model is made of: one family, one file. Architectures never hear of methods."""

from collections.abc import Iterator, Mapping
from typing import Any

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name, text_part
from quantcli.archs.fold import Folds
from quantcli.archs.header import Read, read_header, same_value
from quantcli.archs.mtp import count_blocks
from quantcli.archs.wrappers import headless, text_class, unwrapped
from quantcli.errors import ArchitectureError, UnknownArchitectureError
from quantcli.registry import Registry
from quantcli.types import MetaValue

ARCHITECTURES = Registry(
    "architecture",
    "archs",
    {
        "LlamaForCausalLM": "quantcli.archs.llama:LLAMA",
        "MistralForCausalLM": "quantcli.archs.llama:LLAMA",
        "MixtralForCausalLM": "quantcli.archs.llama:MIXTRAL",
        "Ministral3ForCausalLM": "quantcli.archs.ministral3:MINISTRAL3",
        "Llama4ForCausalLM": "quantcli.archs.llama4:LLAMA4",
        "Step3p5ForCausalLM": "quantcli.archs.step35:STEP35",
        "Step3p7ForConditionalGeneration": "quantcli.archs.step35:STEP35",
        "MuseGlimmerForConditionalGeneration": "quantcli.archs.muse_glimmer:MUSE_GLIMMER",
        "Qwen2ForCausalLM": "quantcli.archs.qwen2:QWEN2",
        "Qwen3ForCausalLM": "quantcli.archs.qwen3:QWEN3",
        "Qwen3ForSequenceClassification": "quantcli.archs.qwen3:QWEN3_CLASSIFIER",
        "Qwen3MoeForCausalLM": "quantcli.archs.qwen3_moe:QWEN3_MOE",
        "Qwen3NextForCausalLM": "quantcli.archs.qwen3_next:QWEN3_NEXT",
        "Qwen3_5ForCausalLM": "quantcli.archs.qwen3_5:QWEN3_5",
        "Qwen3_5MoeForCausalLM": "quantcli.archs.qwen3_5:QWEN3_5_MOE",
        "MellumForCausalLM": "quantcli.archs.mellum:MELLUM",
        "MiMoV2FlashForCausalLM": "quantcli.archs.mimo2:MIMO2",
        "Gemma2ForCausalLM": "quantcli.archs.gemma2:GEMMA2",
        "Gemma3ForCausalLM": "quantcli.archs.gemma3:GEMMA3",
        "Gemma3nForCausalLM": "quantcli.archs.gemma3n:GEMMA3N",
        "Gemma4ForCausalLM": "quantcli.archs.gemma4:GEMMA4",
        "Gemma4UnifiedForCausalLM": "quantcli.archs.gemma4:GEMMA4_UNIFIED",
        "Qwen2VLForConditionalGeneration": "quantcli.archs.qwen_vl:QWEN2_VL",
        "Qwen2_5_VLForConditionalGeneration": "quantcli.archs.qwen_vl:QWEN2_VL",
        "Qwen3VLForConditionalGeneration": "quantcli.archs.qwen_vl:QWEN3_VL",
        "Qwen3VLMoeForConditionalGeneration": "quantcli.archs.qwen_vl:QWEN3_VL_MOE",
        "Phi3ForCausalLM": "quantcli.archs.phi3:PHI3",
        "GraniteForCausalLM": "quantcli.archs.granite:GRANITE",
        "GraniteSWAForCausalLM": "quantcli.archs.granite_swa:GRANITE_SWA",
        "GraniteMoeSWAForCausalLM": "quantcli.archs.granite_swa:GRANITE_MOE_SWA",
        "GraniteMoeForCausalLM": "quantcli.archs.granite_moe:GRANITE_MOE",
        "GraniteMoeSharedForCausalLM": "quantcli.archs.granite_moe:GRANITE_MOE",
        "BambaForCausalLM": "quantcli.archs.bamba:BAMBA",
        "GraniteMoeHybridForCausalLM": "quantcli.archs.granite_hybrid:GRANITE_HYBRID",
        "SmolLM3ForCausalLM": "quantcli.archs.smollm3:SMOLLM3",
        "SeedOssForCausalLM": "quantcli.archs.seed_oss:SEED_OSS",
        "ArceeForCausalLM": "quantcli.archs.arcee:ARCEE",
        "DeciLMForCausalLM": "quantcli.archs.deci:DECI",
        "InternLM2ForCausalLM": "quantcli.archs.internlm2:INTERNLM2",
        "InternLM3ForCausalLM": "quantcli.archs.llama:INTERNLM3",
        "XverseForCausalLM": "quantcli.archs.llama:XVERSE",
        "MiniCPMForCausalLM": "quantcli.archs.minicpm:MINICPM",
        "OrionForCausalLM": "quantcli.archs.orion:ORION",
        "AfmoeForCausalLM": "quantcli.archs.afmoe:AFMOE",
        "LagunaForCausalLM": "quantcli.archs.laguna:LAGUNA",
        "ApertusForCausalLM": "quantcli.archs.apertus:APERTUS",
        "HunYuanDenseV1ForCausalLM": "quantcli.archs.hunyuan:HUNYUAN",
        "HunYuanMoEV1ForCausalLM": "quantcli.archs.hunyuan:HUNYUAN_MOE",
        "Olmo2ForCausalLM": "quantcli.archs.olmo2:OLMO2",
        "Olmo3ForCausalLM": "quantcli.archs.olmo2:OLMO3",
        "GemmaForCausalLM": "quantcli.archs.gemma:GEMMA",
        "CohereForCausalLM": "quantcli.archs.cohere:COHERE",
        "Cohere2ForCausalLM": "quantcli.archs.cohere:COHERE2",
        "Cohere2MoeForCausalLM": "quantcli.archs.cohere2_moe:COHERE2_MOE",
        "NemotronForCausalLM": "quantcli.archs.nemotron:NEMOTRON",
        "Jais2ForCausalLM": "quantcli.archs.jais2:JAIS2",
        "FalconH1ForCausalLM": "quantcli.archs.falcon_h1:FALCON_H1",
        "MambaForCausalLM": "quantcli.archs.mamba:MAMBA",
        "FalconMambaForCausalLM": "quantcli.archs.mamba:MAMBA",
        "Mamba2ForCausalLM": "quantcli.archs.mamba:MAMBA2",
        "JambaForCausalLM": "quantcli.archs.jamba:JAMBA",
        "NemotronHForCausalLM": "quantcli.archs.nemotron_h:NEMOTRON_H",
        "Starcoder2ForCausalLM": "quantcli.archs.starcoder2:STARCODER2",
        "StableLmForCausalLM": "quantcli.archs.stablelm:STABLELM",
        "PhiForCausalLM": "quantcli.archs.phi2:PHI2",
        "Glm4ForCausalLM": "quantcli.archs.glm4:GLM4",
        "Glm4vForConditionalGeneration": "quantcli.archs.glm4:GLM4V",
        "GlmOcrForConditionalGeneration": "quantcli.archs.glm4:GLM_OCR",
        "GlmForCausalLM": "quantcli.archs.glm4:GLM",
        "Ernie4_5ForCausalLM": "quantcli.archs.ernie4_5:ERNIE4_5",
        "PaddleOCRVLForConditionalGeneration": "quantcli.archs.paddleocr:PADDLEOCR",
        "Exaone4ForCausalLM": "quantcli.archs.exaone4:EXAONE4",
        "OlmoeForCausalLM": "quantcli.archs.olmoe:OLMOE",
        "GptOssForCausalLM": "quantcli.archs.gpt_oss:GPT_OSS",
        "Qwen2MoeForCausalLM": "quantcli.archs.qwen2_moe:QWEN2_MOE",
        "DeepseekV3ForCausalLM": "quantcli.archs.deepseek2:DEEPSEEK_V3",
        "DeepseekV32ForCausalLM": "quantcli.archs.sparse_attention:DEEPSEEK_V32",
        "GlmMoeDsaForCausalLM": "quantcli.archs.sparse_attention:GLM_MOE_DSA",
        "DeepseekV2ForCausalLM": "quantcli.archs.deepseek2:DEEPSEEK_V2",
        "YoutuForCausalLM": "quantcli.archs.youtu:YOUTU",
        "MiniCPM3ForCausalLM": "quantcli.archs.minicpm3:MINICPM3",
        "Ernie4_5_MoeForCausalLM": "quantcli.archs.ernie4_5_moe:ERNIE4_5_MOE",
        "BailingMoeV2ForCausalLM": "quantcli.archs.bailing_moe2:BAILING_MOE2",
        "HYV3ForCausalLM": "quantcli.archs.hy_v3:HY_V3",
        "ExaoneMoeForCausalLM": "quantcli.archs.exaone_moe:EXAONE_MOE",
        "ExaoneMoEForCausalLM": "quantcli.archs.exaone_moe:EXAONE_MOE",
        "Mistral4ForCausalLM": "quantcli.archs.mistral4:MISTRAL4",
        "Glm4MoeForCausalLM": "quantcli.archs.glm4_moe:GLM4_MOE",
        "Glm4vMoeForConditionalGeneration": "quantcli.archs.glm4_moe:GLM4V_MOE",
        "SolarOpenForCausalLM": "quantcli.archs.glm4_moe:SOLAR",
        "Dots1ForCausalLM": "quantcli.archs.dots1:DOTS1",
        "MiniMaxM2ForCausalLM": "quantcli.archs.minimax_m2:MINIMAX_M2",
        "Glm4MoeLiteForCausalLM": "quantcli.archs.deepseek2:GLM4_MOE_LITE",
        "Lfm2ForCausalLM": "quantcli.archs.lfm2:LFM2",
        "Lfm2MoeForCausalLM": "quantcli.archs.lfm2_moe:LFM2_MOE",
        "GPT2LMHeadModel": "quantcli.archs.gpt2:GPT2",
        "GPTBigCodeForCausalLM": "quantcli.archs.starcoder:STARCODER",
        "GPTNeoXForCausalLM": "quantcli.archs.gptneox:GPTNEOX",
        "BloomForCausalLM": "quantcli.archs.bloom:BLOOM",
        "FalconForCausalLM": "quantcli.archs.falcon:FALCON",
        "MptForCausalLM": "quantcli.archs.mpt:MPT",
        "MPTForCausalLM": "quantcli.archs.mpt:MPT",
        "OlmoForCausalLM": "quantcli.archs.olmo:OLMO",
        "BertModel": "quantcli.archs.bert:BERT",
        "BertForMaskedLM": "quantcli.archs.bert:BERT",
        "BertForPreTraining": "quantcli.archs.bert:BERT",
        "BertForSequenceClassification": "quantcli.archs.bert:BERT_CLASSIFIER",
        "RobertaModel": "quantcli.archs.bert:ROBERTA",
        "RobertaForMaskedLM": "quantcli.archs.bert:ROBERTA",
        "RobertaForSequenceClassification": "quantcli.archs.bert:ROBERTA_CLASSIFIER",
        "XLMRobertaModel": "quantcli.archs.bert:ROBERTA",
        "XLMRobertaForMaskedLM": "quantcli.archs.bert:ROBERTA",
        "XLMRobertaForSequenceClassification": "quantcli.archs.bert:ROBERTA_CLASSIFIER",
        "CamembertModel": "quantcli.archs.bert:ROBERTA",
        "CamembertForMaskedLM": "quantcli.archs.bert:ROBERTA",
        "CamembertForSequenceClassification": "quantcli.archs.bert:ROBERTA_CLASSIFIER",
        "DistilBertModel": "quantcli.archs.bert:DISTILBERT",
        "DistilBertForMaskedLM": "quantcli.archs.bert:DISTILBERT",
        "NomicBertModel": "quantcli.archs.nomic_bert:NOMIC_BERT",
        "JinaEmbeddingsV3Model": "quantcli.archs.nomic_bert:JINA_V3",
        "JinaBertModel": "quantcli.archs.jina_bert:JINA_BERT",
        "JinaBertForMaskedLM": "quantcli.archs.jina_bert:JINA_BERT",
        "ModernBertModel": "quantcli.archs.modern_bert:MODERN_BERT",
        "ModernBertForMaskedLM": "quantcli.archs.modern_bert:MODERN_BERT",
        "ModernBertForSequenceClassification": "quantcli.archs.modern_bert:MODERN_BERT_CLASSIFIER",
        "T5ForConditionalGeneration": "quantcli.archs.t5:T5",
        "MT5ForConditionalGeneration": "quantcli.archs.t5:T5",
        "T5EncoderModel": "quantcli.archs.t5:T5_ENCODER",
        "MT5EncoderModel": "quantcli.archs.t5:T5_ENCODER",
        "UMT5EncoderModel": "quantcli.archs.t5:UMT5_ENCODER",
        "EuroBertModel": "quantcli.archs.eurobert:EUROBERT",
        "EuroBertForMaskedLM": "quantcli.archs.eurobert:EUROBERT",
    },
)
"""By the class name in config.json's "architectures"."""


def find_architecture(config: Config) -> Architecture:
    """The architecture of the model that ``config`` (config.json) describes.

    Raises UnknownArchitectureError when its class is not in the table.
    """
    name = class_name(config)
    inside = None if name in ARCHITECTURES else text_class(config, name, ARCHITECTURES)
    if inside is not None:
        family = _variant(inside, config)
        return unwrapped(family) if text_part(config) else headless(family)
    if name not in ARCHITECTURES and name.endswith("ForSequenceClassification"):
        raise UnknownArchitectureError(
            f"{name} is a classifier, which llama.cpp has for BERT and its kin, ModernBERT and "
            "Qwen3 only",
            hint="model folders such as --to compressed-tensors need no table",
        )
    if name not in ARCHITECTURES:
        raise UnknownArchitectureError(
            f"architecture {name} is not supported",
            hint="convert it with llama.cpp's convert_hf_to_gguf.py --outtype bf16, then quantize "
            "that GGUF, for which no table is needed; nor do model folders need one, such as "
            "--to compressed-tensors",
        )
    return _variant(name, config)


def find_folds(arch: str) -> Folds:
    """The fold groups that the family with GGUF's name ``arch`` declares; empty when unknown."""
    return next((family.folds for family in _named(arch)), Folds())


def rebuild_config(
    arch: str,
    metadata: Mapping[str, MetaValue],
    shapes: Mapping[str, tuple[int, ...]],
    read: Read,
) -> dict[str, Any]:
    """The configuration (config.json) of a GGUF's model, from its key-values and tensors' shapes.

    ``read`` gives the values of a small tensor by its name. Raises ArchitectureError when the
    architecture is unknown or the configuration makes other key-values.
    """
    family = next(_named(arch), None)
    if family is None:
        raise ArchitectureError(
            f"the configuration of a {arch} model cannot be told from its GGUF: it has no table",
            hint="the checkpoint that it was made from needs none",
        )
    if "token_embd.weight" not in shapes:
        raise ArchitectureError("the GGUF has no tensor token_embd.weight")
    config = {
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **family.to_config(read_header(arch, metadata, shapes, read)),
    }
    if family.mtp is not None:
        config[family.mtp.key] = len(count_blocks(arch, metadata))
    for key, value in find_architecture(config).metadata(config).items():
        if key in metadata and not same_value(metadata[key].value, value.value):
            raise ArchitectureError(
                f"the GGUF sets {key} to {metadata[key].value!r}, but quantcli knows {arch} "
                f"models of this kind with {value.value!r} only",
                hint="--config names a folder with its config.json",
            )
    return config


def _variant(name: str, config: Config) -> Architecture:
    family: Architecture = ARCHITECTURES.get(name)
    return family.variant(config)


def _named(arch: str) -> Iterator[Architecture]:
    for name in ARCHITECTURES:
        family: Architecture = ARCHITECTURES.get(name)
        families = (family, *(other for _, other in family.others))
        yield from (found for found in families if found.name == arch)


__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "find_architecture",
    "find_folds",
    "rebuild_config",
]
