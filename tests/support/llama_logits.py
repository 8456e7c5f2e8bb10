"""The real llama.cpp's logits, computed as exactly as it can: no GPU, no flash attention.

Keys and values are cached in float32, and repacked weight layouts are off.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

_MESSAGES: list[str] = []


@llama_cpp.llama_log_callback
def _keep(level: int, text: bytes, data: Any) -> None:
    _MESSAGES.append(text.decode(errors="replace"))


def keep_messages() -> None:
    """Collect what llama.cpp says from now on, in place of printing it."""
    llama_cpp.llama_log_set(_keep, ctypes.c_void_p(0))
    _MESSAGES.clear()


def messages() -> str:
    """The last of it."""
    return "".join(_MESSAGES[-10:])


def llama_logits(
    path: Path, tokens: Sequence[int], *, context: int = 256, before: Sequence[int] = ()
) -> NDArray[np.float32]:
    """Logits after each of ``tokens``, shape (tokens, vocabulary).

    ``before`` is what an encoder reads, where the model has one.
    """
    keep_messages()
    loading = llama_cpp.llama_model_default_params()
    loading.n_gpu_layers = 0
    loading.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
    if not model:
        raise AssertionError(f"llama.cpp does not load {path}:\n{messages()}")
    running = llama_cpp.llama_context_default_params()
    running.n_ctx = context
    running.n_batch = running.n_ubatch = max(len(tokens), len(before))
    running.n_threads = running.n_threads_batch = 2
    running.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    running.type_k = running.type_v = llama_cpp.GGML_TYPE_F32
    state = llama_cpp.llama_init_from_model(model, running)
    batch = llama_cpp.llama_batch_init(max(len(tokens), len(before)), 0, 1)
    try:
        if before:
            fill(batch, before)
            if llama_cpp.llama_encode(state, batch) != 0:
                raise AssertionError(f"llama.cpp does not encode {path}")
        fill(batch, tokens)
        if llama_cpp.llama_decode(state, batch) != 0:
            raise AssertionError(f"llama.cpp does not decode {path}")
        size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        logits = llama_cpp.llama_get_logits(state)
        return np.ctypeslib.as_array(logits, (len(tokens), size)).copy()
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(state)
        llama_cpp.llama_model_free(model)


def fill(batch: Any, tokens: Sequence[int]) -> None:
    """Put a text of one sequence into a batch, with an output for each token."""
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position] = token
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = True
