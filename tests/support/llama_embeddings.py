"""The real llama.cpp's embeddings of a text's tokens, or one vector or the scores of the text."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from support.llama_logits import fill, keep_messages, messages

NONE, MEAN, CLS, LAST, RANK = 0, 1, 2, 3, 4
"""LLAMA_POOLING_TYPE_*; -1 is the file's own."""


def llama_embeddings(
    path: Path, tokens: Sequence[int], *, pooling: int = NONE
) -> NDArray[np.float32]:
    """Embeddings of shape (tokens, size); pooled ones, or a classifier's scores, as one row."""
    keep_messages()
    loading = llama_cpp.llama_model_default_params()
    loading.n_gpu_layers = 0
    loading.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
    if not model:
        raise AssertionError(f"llama.cpp does not load {path}:\n{messages()}")
    running = llama_cpp.llama_context_default_params()
    running.n_ctx = running.n_batch = running.n_ubatch = max(len(tokens), 64)
    running.n_threads = running.n_threads_batch = 2
    running.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    running.type_k = running.type_v = llama_cpp.GGML_TYPE_F32
    running.embeddings = True
    running.pooling_type = pooling
    state = llama_cpp.llama_init_from_model(model, running)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        fill(batch, tokens)
        if llama_cpp.llama_decode(state, batch) != 0:
            raise AssertionError(f"llama.cpp does not run {path}:\n{messages()}")
        kind = llama_cpp.llama_pooling_type(state)
        if kind == NONE:
            shape, found = (len(tokens), _size(model)), llama_cpp.llama_get_embeddings(state)
        else:
            count = llama_cpp.llama_model_n_cls_out(model) if kind == RANK else _size(model)
            shape, found = (1, count), llama_cpp.llama_get_embeddings_seq(state, 0)
        return np.ctypeslib.as_array(found, shape).copy()
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(state)
        llama_cpp.llama_model_free(model)


def _size(model: ctypes.c_void_p) -> int:
    return int(llama_cpp.llama_model_n_embd(model))
