"""Qwen3-Reranker: a language model whose answers "yes" and "no" are the scores of a classifier.

llama.cpp's server ranks with a classifier only, so the two answers' rows of the output matrix are
written as one, with the prompt that the model was trained on; all else stays, so the file still
writes text. Known by its name, since its config.json is that of any Qwen3.
Sources: arXiv:2506.05176, the model's card, llama.cpp's conversion/qwen.py and ``build_pooling``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from quantcli.archs.encoder import RANK
from quantcli.types import MetaValue, OutputTensor, array, text, u32

PROMPT_KEY = "tokenizer.chat_template.rerank"
_NAME, _ARCH = "qwen3-reranker", "qwen3"
_ANSWERS = ("yes", "no")
_HEADS = ("output.weight", "token_embd.weight")
_PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: Given a web search query, retrieve relevant passages that "
    "answer the query\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


@dataclass(frozen=True)
class Classifier:
    """What is added to the model: a tensor, key-values, and a remark on them."""

    tensor: OutputTensor
    metadata: Mapping[str, MetaValue]
    remark: str


def find_reranker(
    names: Iterable[str],
    arch: str,
    metadata: Mapping[str, MetaValue],
    tensors: Sequence[OutputTensor],
) -> Classifier | None:
    """The classifier of a model with one of these ``names``; None where it is no such model."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if arch != _ARCH or tokens is None or not any(_NAME in name.lower() for name in names):
        return None
    named = {tensor.name: tensor for tensor in tensors}
    head = next(named[name] for name in _HEADS if name in named)
    ids = [tokens.value.index(answer) for answer in _ANSWERS if answer in tokens.value]
    if len(ids) < len(_ANSWERS) or len(head.pieces) != 1 or "cls.output.weight" in named:
        return None
    (piece,) = head.pieces
    rows = tuple(replace(piece, rows=1, start=piece.start + number) for number in ids)
    templates = metadata.get("tokenizer.chat_templates")
    others = [] if templates is None else list(templates.value)
    return Classifier(
        OutputTensor("cls.output.weight", (len(ids), head.columns), head.dtype, rows),
        {
            f"{arch}.pooling_type": u32(RANK),
            f"{arch}.classifier.output_labels": array("str", list(_ANSWERS)),
            "tokenizer.chat_templates": array("str", [*others, "rerank"]),
            PROMPT_KEY: text(_PROMPT),
        },
        "by its name this is Qwen3-Reranker: the probability of its answer 'yes' is written as a "
        "classifier too, which llama.cpp ranks with",
    )
