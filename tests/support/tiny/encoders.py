"""Encoders: BERT and what came after, as embedders and as classifiers."""

from __future__ import annotations

from support.tiny.base import BASE, GEMMA3, VOCAB, Tiny

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 320,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_BERT = _SIZES | {"layer_norm_eps": 0.01, "type_vocab_size": 2}
_ROBERTA = _BERT | {"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_ROTATED = _BERT | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
_MODERN = {key: value for key, value in _SIZES.items() if "dropout" not in key} | {
    "num_hidden_layers": 4,
    "norm_eps": 0.01,
    "local_attention": 24,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "cls_token_id": 0,
    "sep_token_id": 1,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 3000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    },
}
_THREE = {"num_labels": 3}
_T5 = {
    "vocab_size": VOCAB, "d_model": 64, "d_kv": 12, "d_ff": 96, "num_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 16, "layer_norm_epsilon": 0.01, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "n_positions": 320,
}  # fmt: skip
_GATED = {"feed_forward_proj": "gated-gelu"}

ENCODERS: dict[str, Tiny] = {
    "bert": Tiny("BertModel", _BERT, "BertConfig"),
    "bert-masked": Tiny("BertForMaskedLM", _BERT, "BertConfig"),
    "bert-classifier": Tiny("BertForSequenceClassification", _BERT | _THREE, "BertConfig"),
    "roberta": Tiny("RobertaModel", _ROBERTA, "RobertaConfig"),
    "xlm-roberta-reranker": Tiny(
        "XLMRobertaForSequenceClassification", _ROBERTA | {"num_labels": 1}, "XLMRobertaConfig"
    ),
    "distilbert": Tiny(
        "DistilBertModel",
        {"vocab_size": VOCAB, "dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4}
        | {"max_position_embeddings": 320},
        "DistilBertConfig",
    ),
    "nomic-bert": Tiny("NomicBertModel", _ROTATED, "NomicBertConfig"),
    "jina-bert-v3": Tiny("JinaEmbeddingsV3Model", _ROTATED, "JinaEmbeddingsV3Config"),
    "modern-bert": Tiny("ModernBertModel", _MODERN, "ModernBertConfig", loads_packed=False),
    "modern-bert-classifier": Tiny(
        "ModernBertForSequenceClassification",
        _MODERN | _THREE | {"classifier_pooling": "mean"},
        "ModernBertConfig",
    ),
    "modern-bert-silu": Tiny(
        "ModernBertForSequenceClassification",
        _MODERN | {"num_labels": 1, "classifier_pooling": "cls", "hidden_activation": "silu"},
        "ModernBertConfig",
    ),
    "eurobert": Tiny(
        "EuroBertModel",
        {key: value for key, value in _SIZES.items() if "dropout" not in key}
        | {"num_key_value_heads": 2, "rms_norm_eps": 0.01, "pad_token_id": 0}
        | {"bos_token_id": 0, "eos_token_id": 1, "mask_token_id": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 3000.0}},
        "EuroBertConfig",
    ),
    "gemma-embedding": Tiny(
        "Gemma3TextModel",
        GEMMA3 | {"sliding_window": 24, "use_bidirectional_attention": True},
        "Gemma3TextConfig",
    ),
    "qwen3-classifier": Tiny(
        "Qwen3ForSequenceClassification",
        BASE | _THREE | {"head_dim": 16, "pad_token_id": 0},
        "Qwen3Config",
    ),
    "t5-encoder": Tiny("T5EncoderModel", _T5, "T5Config"),
    "umt5-encoder": Tiny("UMT5EncoderModel", _T5 | _GATED, "UMT5Config"),
}

TRANSLATORS: dict[str, Tiny] = {
    "t5": Tiny("T5ForConditionalGeneration", _T5, "T5Config"),
    "t5-gated": Tiny(
        "T5ForConditionalGeneration",
        _T5 | _GATED | {"num_decoder_layers": 2, "tie_word_embeddings": False},
        "T5Config",
    ),
    "mt5": Tiny("MT5ForConditionalGeneration", _T5 | _GATED, "MT5Config"),
}
"""An encoder and a decoder each."""
