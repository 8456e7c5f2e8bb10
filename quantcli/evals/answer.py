"""A first answer of a GGUF in llama.cpp, piece by piece as it is written.

Samplers are llama-cli's defaults (top-k 40, top-p 0.95, min-p 0.05, temperature 0.8) with a fixed
seed, so that the same file gives the same answer.
"""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantcli.errors import SourceError
from quantcli.evals.engines.llama_cpp import be_silent, load_library, load_model

MOST_TOKENS = 256
TOP_K, TOP_P, MIN_P, TEMPERATURE, SEED = 40, 0.95, 0.05, 0.8, 0
_PIECE = 256


def stream_answer(
    path: Path,
    prompt: str,
    *,
    is_rendered: bool,
    threads: int,
    most: int = MOST_TOKENS,
    temperature: float = TEMPERATURE,
) -> Iterator[str]:
    """What the model writes after ``prompt``, until it ends or ``most`` tokens are written.

    ``is_rendered``: a chat template made the prompt, so that control tokens are spelled out in it.
    SourceError where llama.cpp cannot run the file.
    """
    lib = load_library()
    be_silent(lib)
    model = load_model(lib, path)
    try:
        vocab = lib.llama_model_get_vocab(model)
        tokens = _tokenize(lib, vocab, prompt, is_rendered)
        options = lib.llama_context_default_params()
        options.n_ctx = len(tokens) + most
        options.n_batch = max(512, len(tokens))
        options.n_threads = options.n_threads_batch = threads
        context = lib.llama_init_from_model(model, options)
        if not context:
            raise SourceError(f"{path}: llama.cpp cannot run it with {options.n_ctx} tokens")
        sampler = _sampler(lib, temperature)
        try:
            yield from _write(lib, vocab, context, sampler, tokens, most, path)
        finally:
            lib.llama_sampler_free(sampler)
            lib.llama_free(context)
    finally:
        lib.llama_model_free(model)


def _write(
    lib: Any, vocab: Any, context: Any, sampler: Any, tokens: list[int], most: int, path: Path
) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    piece = ctypes.create_string_buffer(_PIECE)
    for _ in range(most):
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens))) != 0:
            raise SourceError(f"{path}: llama.cpp failed on a text of {len(tokens)} tokens")
        token = int(lib.llama_sampler_sample(sampler, context, -1))
        if lib.llama_vocab_is_eog(vocab, token):
            break
        size = lib.llama_token_to_piece(vocab, token, piece, _PIECE, 0, False)
        text = decoder.decode(piece.raw[: max(0, size)])
        if text:
            yield text
        tokens = [token]
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


def _tokenize(lib: Any, vocab: Any, text: str, is_rendered: bool) -> list[int]:
    raw = text.encode()
    ids = (ctypes.c_int32 * (len(raw) + 16))()
    # A template that writes the beginning token out must not get a second one.
    begin = lib.llama_vocab_get_text(vocab, lib.llama_vocab_bos(vocab)) or b""
    adds = not (is_rendered and begin and raw.startswith(begin))
    count = lib.llama_tokenize(vocab, raw, len(raw), ids, len(ids), adds, is_rendered)
    if count <= 0:
        raise SourceError("llama.cpp makes no tokens of the prompt", hint="say something")
    return list(ids[:count])


def _sampler(lib: Any, temperature: float) -> Any:
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    parts = [lib.llama_sampler_init_greedy()]
    if temperature > 0:
        parts = [
            lib.llama_sampler_init_top_k(TOP_K),
            lib.llama_sampler_init_top_p(TOP_P, 1),
            lib.llama_sampler_init_min_p(MIN_P, 1),
            lib.llama_sampler_init_temp(temperature),
            lib.llama_sampler_init_dist(SEED),
        ]
    for part in parts:
        lib.llama_sampler_chain_add(chain, part)
    return chain
