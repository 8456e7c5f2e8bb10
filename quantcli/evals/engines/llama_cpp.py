"""llama.cpp itself, through llama-cpp-python: what a user's runtime makes of a GGUF.

Weight repacking is switched off: repacked code paths round differently (and one of them crashes
on AMX machines), and a quality figure should not depend on the processor's extras.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantcli.errors import MissingExtraError, SourceError
from quantcli.evals.engines.base import Source, check_finite
from quantcli.evals.scores import Floats, row_blocks
from quantcli.evals.windows import Tokens, Window
from quantcli.model import Model

INSTALL = "pip install llama-cpp-python"

PIECE = 512
"""Tokens that llama.cpp takes at once: its buffers grow with them times the context."""


def load_library() -> Any:
    """The ``llama_cpp`` module; MissingExtraError with the install command without it."""
    try:
        import llama_cpp
    except ImportError:
        raise MissingExtraError(
            "the llama.cpp engine needs llama-cpp-python", hint=INSTALL
        ) from None
    return llama_cpp


def open_engine(source: Source, context: int, threads: int) -> LlamaCppEngine:
    """The engine for a GGUF; SourceError for a checkpoint, which llama.cpp does not read."""
    if not source.model.from_gguf:
        raise SourceError(
            f"{source.label} is a checkpoint, and llama.cpp runs GGUF files only",
            hint=f"'quantcli quantize {source.label} --bits 16' makes one, or --engine torch",
        )
    check_metadata(source.model)
    return LlamaCppEngine(source.model.path, source.label, context, threads=threads)


def check_metadata(model: Model) -> None:
    """SourceError for what makes llama.cpp end the whole process, or never end."""
    blocks = model.count("block_count")
    if blocks > _MOST_BLOCKS:
        raise SourceError(
            f"{model.path} says that it has {blocks:,} blocks; llama.cpp takes {_MOST_BLOCKS}"
        )
    for tensor in model.tensors:
        if tensor.name.endswith(".weight") and tensor.dtype in _NO_WEIGHTS:
            raise SourceError(
                f"{model.path}: llama.cpp does not compute with weights of type {tensor.dtype}, "
                f"which {tensor.name} has"
            )
    for key, value in model.metadata.items():
        number = value.value if value.kind in ("f32", "f64") else 0.0
        if not math.isfinite(number) or (key.endswith("epsilon") and number < 0):
            raise SourceError(f"{model.path}: the key-value {key} is {number}, no sound number")
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    # It names empty ones by their number.
    listed = tokens is not None and tokens.kind == "[str]"
    if listed and tokens is not None and not tokens.value:
        raise SourceError(f"{model.path} has an empty list of tokens, at which llama.cpp stops")
    texts = [token for token in tokens.value if token] if tokens and listed else []
    if len(set(texts)) < len(texts):
        twice = next(token for token, count in Counter(texts).items() if count > 1)
        raise SourceError(
            f"{model.path} has the token {twice!r} more than once, at which llama.cpp stops"
        )


class LlamaVocabulary:
    """A GGUF's tokenizer as llama.cpp runs it, without its weights."""

    def __init__(self, path: Path, model: Any = None) -> None:
        self._lib = lib = load_library()
        be_silent(lib)
        self._path = path
        self._own = None if model else load_model(lib, path, vocab_only=True)
        self._vocab = lib.llama_model_get_vocab(model or self._own)
        self.size = int(lib.llama_vocab_n_tokens(self._vocab))
        adds = lib.llama_vocab_get_add_bos(self._vocab)
        self.begin = int(lib.llama_vocab_bos(self._vocab)) if adds else None

    def encode(self, text: str, *, spelled: bool = False) -> Tokens:
        """Token ids of a text; control tokens in it are plain text unless ``spelled``."""
        raw = text.encode()
        room = len(raw) + 16
        ids = np.empty(room, np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), pointer, room, True, spelled)
        if count < 0:
            raise SourceError(f"{self._path}: llama.cpp cannot tokenize the text")
        return ids[:count].copy()

    def close(self) -> None:
        """Free what was loaded for the vocabulary alone."""
        if self._own:
            self._lib.llama_model_free(self._own)
            self._own = None


class LlamaCppEngine:
    """A GGUF in llama.cpp's CPU runtime, for windows of up to ``context`` tokens."""

    name = "llama.cpp"

    def __init__(self, path: Path, label: str, context: int, *, threads: int) -> None:
        self._lib = lib = load_library()
        be_silent(lib)
        self._label = label
        self._model = load_model(lib, path)
        options = lib.llama_context_default_params()
        options.n_ctx = context
        options.n_batch = options.n_ubatch = min(context, PIECE)
        options.n_seq_max = 1
        options.n_threads = options.n_threads_batch = threads
        options.no_perf = True
        self._context = lib.llama_init_from_model(self._model, options)
        if not self._context:
            lib.llama_model_free(self._model)
            raise SourceError(f"{path}: llama.cpp cannot run it with a context of {context}")
        self._path = path
        self._batch = lib.llama_batch_init(min(context, PIECE), 0, 1)
        self._words = LlamaVocabulary(path, self._model)
        self.vocabulary, self.begin = self._words.size, self._words.begin

    def tokenize(self, text: str, *, spelled: bool = False) -> Tokens:
        """Token ids of a text, as `LlamaVocabulary.encode` gives them."""
        return self._words.encode(text, spelled=spelled)

    def run(self, windows: Sequence[Window]) -> Iterator[Floats]:
        """Each window's logits, valid until the next is asked for."""
        for number, window in enumerate(windows):
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
            if len(window.tokens) <= PIECE:
                whole = self._decode(window, range(len(window.tokens)))
                blocks = row_blocks(len(whole), self.vocabulary)
                parts: Iterator[Floats] = (whole[rows] for rows in blocks)
            else:
                parts = self._run_in_pieces(window)
            first = 0
            for logits in parts:
                check_finite(logits, self._label, number, first)
                yield logits
                first += len(logits)

    def _run_in_pieces(self, window: Window) -> Iterator[Floats]:
        """A long window: what is not scored, then block after block of what is."""
        for start in range(0, window.first, PIECE):
            self._decode(window, range(start, min(start + PIECE, window.first)))
        for rows in row_blocks(len(window.targets), self.vocabulary):
            start, stop = window.first + rows.start, window.first + rows.stop
            pieces = [range(a, min(a + PIECE, stop)) for a in range(start, stop, PIECE)]
            if len(pieces) == 1:
                yield self._decode(window, pieces[0])
            else:
                # Each piece's logits are llama.cpp's own, and gone with the next.
                yield np.concatenate([self._decode(window, piece).copy() for piece in pieces])

    def _decode(self, window: Window, places: range) -> Floats:
        """Run some of a window's tokens; the logits of those that are scored."""
        lib, batch = self._lib, self._batch
        batch.n_tokens = len(places)
        scored = 0
        for number, place in enumerate(places):
            batch.token[number] = int(window.tokens[place])
            batch.pos[number] = place
            batch.n_seq_id[number] = 1
            batch.seq_id[number][0] = 0
            batch.logits[number] = window.first <= place < window.last
            scored += batch.logits[number]
        if lib.llama_decode(self._context, batch) != 0:
            raise SourceError(
                f"{self._path}: llama.cpp failed on a window of {len(window.tokens)} tokens"
            )
        if not scored:
            return np.empty((0, self.vocabulary), np.float32)
        pointer = lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(scored, self.vocabulary))

    def extend(self, prompt: Tokens, count: int) -> Tokens:
        """The ``count`` likeliest tokens after ``prompt``, one by one."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        tokens, target = prompt, np.zeros(1, np.int64)
        for start in range(0, len(prompt), PIECE):
            places = range(start, min(start + PIECE, len(prompt)))
            logits = self._decode(Window(tokens, len(prompt) - 1, target), places)
        for place in range(len(prompt), len(prompt) + count):
            check_finite(logits, self._label, 0)
            tokens = np.append(tokens, np.int32(logits[0].argmax()))
            if place < len(prompt) + count - 1:
                logits = self._decode(Window(tokens, place, target), range(place, place + 1))
        return tokens[len(prompt) :]

    def close(self) -> None:
        """Free the model and its context."""
        if self._model:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
            self._lib.llama_model_free(self._model)
            self._model = None


def load_model(lib: Any, path: Path, *, vocab_only: bool = False) -> Any:
    """A GGUF in memory, weights not repacked; SourceError with llama.cpp's own reason."""
    lib.llama_backend_init()
    settings = lib.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.use_extra_bufts = False
    settings.vocab_only = vocab_only
    model = lib.llama_model_load_from_file(os.fsencode(path), settings)
    if not model:
        raise SourceError(
            f"{path}: llama.cpp cannot load it{_reason()}",
            hint=f"'quantcli inspect {path}' shows what it holds; --engine torch may run it",
        )
    return model


_MOST_BLOCKS = 512
"""LLAMA_MAX_LAYERS."""
_NO_WEIGHTS = ("Q8_1", "Q8_K", "I8", "I16", "I64", "F64")
"""Types of intermediate results, which it multiplies by without a function for that."""
_ERROR = 4
"""GGML_LOG_LEVEL_ERROR."""
_kept: list[Any] = []
_said: list[str] = []


def be_silent(lib: Any) -> None:
    """llama.cpp talks on standard error; its errors are kept for our own sentences."""

    def keep(level: int, text: bytes, data: Any) -> None:
        if level == _ERROR:
            _said[:] = [*_said[-3:], text.decode(errors="replace").strip()]

    if not _kept:
        _kept.append(lib.llama_log_callback(keep))
    lib.llama_log_set(_kept[0], ctypes.c_void_p(0))
    _said.clear()


def _reason() -> str:
    """The most telling of llama.cpp's last complaints."""
    return f" ({_said[0].rpartition(': ')[2]})" if _said else ""
