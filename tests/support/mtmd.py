"""The real llama.cpp's image and audio embeddings, through the mtmd of llama-cpp-python.

A build with ``-DLLAVA_BUILD=OFF`` has no such library; whoever needs it is skipped then.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

try:
    from llama_cpp import mtmd_cpp as mtmd
except (OSError, RuntimeError, FileNotFoundError):
    pytest.skip("this llama-cpp-python was built without mtmd", allow_module_level=True)

_MESSAGES: list[str] = []


@llama_cpp.llama_log_callback
def _keep(level: int, text: bytes, data: Any) -> None:
    _MESSAGES.append(text.decode(errors="replace"))


def embed_image(model: Path, tower: Path, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Embeddings of an image of shape (rows, columns, 3), one row for each token.

    ``model`` is the text model, whose vocabulary and width the tower must fit. Where llama.cpp cuts
    the image into several chunks, they follow one another.
    """
    rows, columns, _ = pixels.shape
    data = pixels.tobytes()
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    return _embed(model, tower, lambda: mtmd.mtmd_bitmap_init(columns, rows, buffer))


def embed_sound(model: Path, tower: Path, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Embeddings of a sound, of samples at the tower's own rate."""
    buffer = samples.astype(np.float32).ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return _embed(model, tower, lambda: mtmd.mtmd_bitmap_init_from_audio(len(samples), buffer))


def _embed(model: Path, tower: Path, make_bitmap: Any) -> NDArray[np.float32]:
    with _opened(model, tower) as (context, width):
        bitmap = make_bitmap()
        chunks = mtmd.mtmd_input_chunks_init()
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(marker, len(marker), False, True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        failed = mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1)
        assert failed == 0, "".join(_MESSAGES[-10:])
        found = []
        for index in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, index)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                continue
            assert mtmd.mtmd_encode_chunk(context, chunk) == 0, "".join(_MESSAGES[-10:])
            size = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            values = mtmd.mtmd_get_output_embd(context)
            found.append(np.ctypeslib.as_array(values, (size, width)).copy())
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        return np.concatenate(found)


@contextmanager
def _opened(model: Path, tower: Path) -> Iterator[tuple[Any, int]]:
    llama_cpp.llama_log_set(_keep, ctypes.c_void_p(0))
    mtmd.mtmd_log_set(_keep, ctypes.c_void_p(0))
    mtmd.mtmd_helper_log_set(_keep, ctypes.c_void_p(0))
    _MESSAGES.clear()
    loading = llama_cpp.llama_model_default_params()
    loading.n_gpu_layers = 0
    loading.use_extra_bufts = False
    text = llama_cpp.llama_model_load_from_file(str(model).encode(), loading)
    assert text, f"llama.cpp does not load {model}:\n" + "".join(_MESSAGES[-10:])
    running = mtmd.mtmd_context_params_default()
    running.use_gpu = False
    running.n_threads = 2
    running.warmup = False
    running.print_timings = False
    running.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = mtmd.mtmd_init_from_file(str(tower).encode(), text, running)
    assert context, f"llama.cpp does not load {tower}:\n" + "".join(_MESSAGES[-30:])
    try:
        yield context, llama_cpp.llama_model_n_embd_inp(text)
    finally:
        mtmd.mtmd_free(context)
        llama_cpp.llama_model_free(text)
