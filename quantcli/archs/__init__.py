"""What a model is made of: one family, one file. Architectures never hear of methods."""

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, class_name
from quantcli.archs.fold import Folds
from quantcli.errors import ArchitectureError
from quantcli.registry import Registry, near

ARCHITECTURES = Registry(
    "architecture",
    "archs",
    {
        "LlamaForCausalLM": "quantcli.archs.llama:LLAMA",
        "MistralForCausalLM": "quantcli.archs.llama:LLAMA",
        "MixtralForCausalLM": "quantcli.archs.llama:MIXTRAL",
        "Qwen2ForCausalLM": "quantcli.archs.qwen2:QWEN2",
        "Qwen3ForCausalLM": "quantcli.archs.qwen3:QWEN3",
        "Qwen3MoeForCausalLM": "quantcli.archs.qwen3_moe:QWEN3_MOE",
        "Gemma2ForCausalLM": "quantcli.archs.gemma2:GEMMA2",
        "Gemma3ForCausalLM": "quantcli.archs.gemma3:GEMMA3",
        "Gemma3ForConditionalGeneration": "quantcli.archs.gemma3:GEMMA3",
        "Phi3ForCausalLM": "quantcli.archs.phi3:PHI3",
        "GPT2LMHeadModel": "quantcli.archs.gpt2:GPT2",
    },
)
"""By the class name in config.json's "architectures"."""


def find_architecture(config: Config) -> Architecture:
    """The architecture of the model that ``config`` (config.json) describes.

    Raises ArchitectureError, with near names, when its class is not in the table.
    """
    name = class_name(config)
    if name not in ARCHITECTURES:
        guesses = near(name, ARCHITECTURES)
        raise ArchitectureError(
            f"architecture {name} is not supported",
            hint=f"near: {', '.join(guesses)}"
            if guesses
            else f"supported: {', '.join(ARCHITECTURES)}",
        )
    found: Architecture = ARCHITECTURES.get(name)
    return found


def find_folds(arch: str) -> Folds:
    """The fold groups that the family with GGUF's name ``arch`` declares; empty when unknown."""
    families = (ARCHITECTURES.get(name) for name in ARCHITECTURES)
    return next((family.folds for family in families if family.name == arch), Folds())


__all__ = ["ARCHITECTURES", "Architecture", "find_architecture", "find_folds"]
