"""What a model is, in a dozen numbers: from GGUF key-values, or from config.json alone.

An architecture that quantcli knows has key-values, which are checked; for any other the usual
spellings of config.json are taken at their word, so that one can look at a model of any kind. A
number that is not found is None, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantcli.archs.mtp import drop_blocks
from quantcli.types import MetaValue

Number = int | tuple[int, ...] | None
"""A whole number, or one for each layer where they differ."""

_SOURCES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("layers", "block_count", ("num_hidden_layers", "n_layer", "num_layers")),
    ("hidden", "embedding_length", ("hidden_size", "n_embd", "d_model")),
    ("feed_forward", "feed_forward_length", ("intermediate_size", "n_inner", "ffn_dim")),
    ("heads", "attention.head_count", ("num_attention_heads", "n_head")),
    ("kv_heads", "attention.head_count_kv", ("num_key_value_heads",)),
    ("head_dim", "attention.key_length", ("head_dim",)),
    ("context", "context_length", ("max_position_embeddings", "n_positions", "n_ctx")),
    ("window", "attention.sliding_window", ("sliding_window",)),
    ("vocabulary", "vocab_size", ("vocab_size",)),
    ("experts", "expert_count", ("num_local_experts", "num_experts", "n_routed_experts")),
    ("experts_used", "expert_used_count", ("num_experts_per_tok", "moe_top_k")),
    ("expert_feed_forward", "expert_feed_forward_length", ("moe_intermediate_size",)),
)
"""Field, key-value without "{arch}.", and keys of config.json."""


@dataclass(frozen=True, slots=True)
class Facts:
    """The shape of a model. ``architecture`` is GGUF's name, ``model_class`` transformers'."""

    architecture: str | None = None
    model_class: str | None = None
    layers: Number = None
    hidden: Number = None
    feed_forward: Number = None
    heads: Number = None
    kv_heads: Number = None
    head_dim: Number = None
    context: Number = None
    window: Number = None
    vocabulary: Number = None
    experts: Number = None
    experts_used: Number = None
    expert_feed_forward: Number = None


def facts_of_metadata(
    metadata: Mapping[str, MetaValue], config: Mapping[str, Any] | None = None
) -> Facts:
    """The facts that GGUF key-values state; ``config`` adds the model class."""
    found = metadata.get("general.architecture")
    arch = str(found.value) if found is not None else ""
    # config.json counts no blocks for multi-token prediction among the layers.
    metadata = drop_blocks(arch, metadata)
    values = {
        field: _number(metadata[key].value)
        for field, suffix, _ in _SOURCES
        if (key := f"{arch}.{suffix}") in metadata
    }
    tokens = metadata.get("tokenizer.ggml.tokens")
    is_list = tokens is not None and tokens.kind.startswith("[")
    if tokens is not None and is_list and values.get("vocabulary") is None:
        values["vocabulary"] = len(tokens.value)
    return _fill(arch or None, _class(config or {}), values)


def facts_of_config(config: Mapping[str, Any]) -> Facts:
    """The facts that config.json states, of its text part where it has several."""
    inner = config.get("text_config")
    merged = {**config, **inner} if isinstance(inner, Mapping) else config
    values = {
        field: next(
            (n for key in keys if (n := _number(merged.get(key))) is not None),
            None,
        )
        for field, _, keys in _SOURCES
    }
    return _fill(None, _class(config), values)


def _fill(arch: str | None, model_class: str | None, values: dict[str, Number]) -> Facts:
    """Facts with what follows from others: as many key-value heads as heads, equal heads."""
    heads, hidden = values.get("heads"), values.get("hidden")
    if values.get("kv_heads") is None:
        values["kv_heads"] = heads
    if values.get("head_dim") is None and isinstance(heads, int) and isinstance(hidden, int):
        values["head_dim"] = hidden // heads if heads and hidden % heads == 0 else None
    return Facts(arch, model_class, **values)


def _class(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    return None


def _number(value: Any) -> Number:
    """A whole number or one per layer; a list of equal numbers is that number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return None
    parts = [_number(part) for part in value]
    whole = tuple(part for part in parts if isinstance(part, int))
    if not whole or len(whole) != len(parts):
        return None
    return whole[0] if len(set(whole)) == 1 else whole


def number_words(value: Number) -> str:
    """A number for a sentence: "4", or "4 to 16" where layers differ."""
    if value is None:
        return "?"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{min(value):,} to {max(value):,}"
