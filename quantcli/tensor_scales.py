"""Scales of whole tensors beside the weights of a GGUF, and the model with them multiplied in.

``blk.0.attn_q.scale`` is one float32 by which llama.cpp multiplies what ``blk.0.attn_q.weight``
puts out, or one for each expert. Files with NVFP4 weights have them; ``….input_scale`` says how to
round activations and is no part of the weights. Which of them llama.cpp uses is a matter of each
architecture's graph: `SCALED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.formats.base import Floats
from quantcli.model import Model
from quantcli.types import OutputTensor

FORMAT = "NVFP4"
WEIGHT, SCALE, INPUT_SCALE = ".weight", ".scale", ".input_scale"

_ATTENTION = frozenset({"attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"})
_DENSE = frozenset({"ffn_gate", "ffn_up", "ffn_down"})
_EXPERTS = frozenset({"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"})
_SHARED = frozenset({"ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"})
_DELTA = frozenset({"attn_gate", "ssm_alpha", "ssm_beta", "ssm_out"})

_ATTENTION_ALONE = (
    "apertus", "arcee", "bailingmoe2", "bloom", "chatglm", "command-r", "dots1", "ernie4_5",
    "ernie4_5-moe", "exaone-moe", "exaone4", "falcon", "falcon-h1", "gemma", "gemma2", "gemma3",
    "glm4", "glm4moe", "gpt-oss", "gpt2", "gptneox", "granite", "hunyuan-dense", "hunyuan-moe",
    "internlm2", "jais2", "jamba", "lfm2", "lfm2moe", "llama4", "minimax-m2", "mpt", "nemotron",
    "olmo", "olmo2", "olmoe", "orion", "paddleocr", "phi2", "phi3", "qwen2", "qwen2moe",
    "qwen2vl", "qwen3vl", "qwen3vlmoe", "seed_oss", "smollm3", "stablelm", "starcoder",
    "starcoder2", "xverse",
)  # fmt: skip
SCALED: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(_ATTENTION_ALONE, _ATTENTION),
    "llama": _ATTENTION | _DENSE | _EXPERTS,
    "mistral3": _ATTENTION | _DENSE | _EXPERTS,
    "cohere2": _ATTENTION | _DENSE,
    "cohere2moe": _ATTENTION | _DENSE | _EXPERTS | _SHARED,
    "gemma4": _ATTENTION | _DENSE,
    "hy_v3": _ATTENTION | _DENSE | _EXPERTS | _SHARED,
    "mellum": _ATTENTION | _EXPERTS,
    "nemotron_h": _ATTENTION | _DENSE,
    "nemotron_h_moe": _ATTENTION | _DENSE | _EXPERTS | _SHARED,
    "qwen3": _ATTENTION | _DENSE,
    "qwen3moe": _ATTENTION | _EXPERTS,
    "qwen3next": _ATTENTION - {"attn_qkv"} | _EXPERTS | _SHARED,
    "qwen35": _ATTENTION | _DENSE | _DELTA,
    "qwen35moe": _ATTENTION | _EXPERTS | _SHARED | _DELTA,
}
"""The matrices of a block that llama.cpp multiplies by such a scale, by architecture.

From the graphs in llama.cpp's src/models: a weight is here where every product with it is given its
scale. The others are loaded and left out of the computation.
"""
_ONES_OF_THEIR_OWN = frozenset({("gemma4", "ffn_down_exps"), ("gemma4", "ffn_gate_inp")})
"""Scales that are part of the model and stay tensors by themselves."""


def takes_scale(arch: str, name: str, names: Mapping[str, Any]) -> bool:
    """Whether llama.cpp multiplies by a scale beside the weight ``name`` of a model with ``names``.

    It refuses to run one beside a bias of the MLP, which it would multiply as well.
    """
    base = name.removesuffix(WEIGHT)
    leaf = base.rpartition(".")[2]
    if not name.startswith("blk.") or leaf not in SCALED.get(arch, ()):
        return False
    return base + SCALE not in names and not (leaf in _DENSE | _SHARED and base + ".bias" in names)


def find_scales(model: Model) -> dict[str, OutputTensor]:
    """The scale of each weight that has one, by the weight's name."""
    tensors = {tensor.name: tensor for tensor in model.tensors}
    found = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name.removesuffix(WEIGHT) + SCALE)
        leaf = name.removesuffix(WEIGHT).rpartition(".")[2]
        if scale is None or tensor.dtype != FORMAT or (model.arch, leaf) in _ONES_OF_THEIR_OWN:
            continue
        if scale.dtype == "F32" and scale.elements in (1, tensor.matrices):
            found[name] = scale
    return found


def scale_names(model: Model) -> set[str]:
    """The tensors that scale others' weights or inputs."""
    scales = find_scales(model)
    inputs = {name.removesuffix(WEIGHT) + INPUT_SCALE for name in scales}
    names = {tensor.name for tensor in model.tensors}
    return inputs & names | {scale.name for scale in scales.values()}


def row_scales(model: Model) -> dict[str, Floats]:
    """The factors of the rows of each weight that has a scale, float32 (rows, 1), by its name."""
    weights = {tensor.name: tensor for tensor in model.tensors}
    found = {}
    for name, scale in find_scales(model).items():
        values = np.asarray(model.read_rows(scale, 0, scale.rows), np.float32).reshape(-1)
        count = weights[name].matrices
        found[name] = np.repeat(np.resize(values, count), weights[name].rows // count)[:, None]
    return found


@dataclass(frozen=True)
class ScaledModel(Model):
    """A model whose rows come multiplied by their tensor's scale, float32; ``base`` has both."""

    base: Model | None = None
    factors: Mapping[str, Floats] = field(default_factory=dict)

    def read_rows(self, tensor: OutputTensor, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start:stop`` as `Model.read_rows` gives them, decoded and scaled."""
        if self.base is None:
            raise ValueError("a scaled model has no original")
        if tensor.name not in self.factors:
            return self.base.read_rows(tensor, start, stop)
        return self.base.read_floats(tensor, start, stop) * self.factors[tensor.name][start:stop]


def multiply_scales(model: Model) -> Model:
    """``model`` without tensors of scales, for whoever wants its weights; itself if it has none."""
    gone = scale_names(model)
    if not gone:
        return model
    tensors = tuple(tensor for tensor in model.tensors if tensor.name not in gone)
    own = {item.name: getattr(model, item.name) for item in fields(Model)} | {"tensors": tensors}
    return ScaledModel(**own, base=model, factors=row_scales(model))
