"""The process in which llama.cpp's speed is measured: one file, a line of JSON for each run.

By itself, so that its memory is that of this file alone, and that a processor on which llama.cpp's
repacked code crashes costs a run and not the evaluation. What is run is what llama-bench runs:
random tokens, a prompt of so many, then in a context of its own as many steps of one token each, on
an empty cache, once before for warmth, by threads that stay between two steps. Source: ``main``,
``test_prompt`` and ``test_gen`` of tools/llama-bench/llama-bench.cpp.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from quantcli.systems import resident_memory

_BUFFER = re.compile(r"(\S+) +(?:model|KV|RS|compute|output) buffer size = +([\d.]+) MiB")
_BATCH, _UBATCH = 2048, 512
_SETTINGS = 4096
"""Bytes for llama.cpp's settings of threads, which are some 540."""


def main() -> int:
    """Read what is asked from standard input, and measure; 1 when llama.cpp refuses the file."""
    asked = json.load(sys.stdin)
    import llama_cpp as lib

    lines: list[str] = []
    keep = lib.llama_log_callback(lambda level, text, data: lines.append(_decode(text)))
    lib.llama_log_set(keep, ctypes.c_void_p(0))
    before = resident_memory()
    lib.llama_backend_init()
    settings = lib.llama_model_default_params()
    settings.use_extra_bufts = asked["repack"]
    model = lib.llama_model_load_from_file(os.fsencode(asked["path"]), settings)
    if not model:
        return _fail(lines)
    weights, resident, device = _on_devices(lines), 0, 0.0
    prompts: list[tuple[float, float]] = []
    for what in ("prompt", "generation"):
        lines.clear()
        context = _open_context(lib, model, asked[what], asked["threads"])
        if not context:
            return _fail(lines)
        for number, (ours, own) in enumerate(_measure(lib, model, context, what, asked)):
            if what == "prompt":
                prompts.append((ours, own))
            else:
                prompt, own_prompt = prompts[number]
                _say(prompt=prompt, generation=ours, own_prompt=own_prompt, own_generation=own)
        resident = max(resident, resident_memory() - before)
        device = max(device, _on_devices(lines))
        lib.llama_free(context)
    _say(resident=resident, device=round((weights + device) * 2**20))
    # What llama.cpp frees at exit is the system's to free.
    sys.stdout.flush()
    os._exit(0)


def _open_context(lib: Any, model: Any, tokens: int, threads: int) -> Any:
    options = lib.llama_context_default_params()
    options.n_ctx = tokens
    options.n_batch, options.n_ubatch = _BATCH, _UBATCH
    options.n_threads = options.n_threads_batch = threads
    options.swa_full = False
    options.no_perf = False
    context = lib.llama_init_from_model(model, options)
    if context:
        _attach_threads(lib, context, threads)
    return context


def _attach_threads(lib: Any, context: Any, threads: int) -> None:
    """Have threads that stay; without them llama.cpp sets some up for each step.

    llama-cpp-python has no names for these functions, the libraries that it brings have.
    """
    library = lib.llama_cpp._lib
    try:
        describe, make = library.ggml_threadpool_params_init, library.ggml_threadpool_new
        attach = library.llama_attach_threadpool
    except AttributeError:
        return
    settings = ctypes.create_string_buffer(_SETTINGS)
    describe.argtypes, describe.restype = [ctypes.c_void_p, ctypes.c_int], None
    make.argtypes, make.restype = [ctypes.c_void_p], ctypes.c_void_p
    attach.argtypes, attach.restype = [ctypes.c_void_p] * 3, None
    describe(settings, threads)
    pool = make(settings)
    if pool:
        attach(context, pool, None)


def _measure(
    lib: Any, model: Any, context: Any, what: str, asked: dict[str, Any]
) -> Iterator[tuple[float, float]]:
    """Tokens per second of each run, by our clock and by llama.cpp's."""
    run, count = _Run(lib, model, context), asked[what]
    work = run.prompt if what == "prompt" else run.generate
    work(run.batches(what, min(count, _UBATCH) if what == "prompt" else 1))
    for _ in range(asked["runs"]):
        lib.llama_perf_context_reset(context)
        ours = run.timed(work, run.batches(what, count), count)
        own = lib.llama_perf_context(context)
        if what == "prompt":
            yield ours, _rate(own.n_p_eval, own.t_p_eval_ms)
        else:
            yield ours, _rate(own.n_eval, own.t_eval_ms)


class _Run:
    """Random tokens through one context."""

    def __init__(self, lib: Any, model: Any, context: Any) -> None:
        self._lib, self._context = lib, context
        vocab = lib.llama_model_get_vocab(model)
        self._size = int(lib.llama_vocab_n_tokens(vocab))
        adds = lib.llama_vocab_get_add_bos(vocab)
        self._begin = int(lib.llama_vocab_bos(vocab)) if adds else None
        self._random = random.Random(0)

    def batches(self, what: str, count: int) -> list[tuple[Any, Any]]:
        """Batches of ``count`` tokens, with what they point to: made before the clock runs."""
        tokens = [self._random.randrange(self._size) for _ in range(count)]
        if self._begin is not None:
            tokens[0] = self._begin
        step = _BATCH if what == "prompt" else 1
        found = []
        for start in range(0, count, step):
            part = tokens[start : start + step]
            array = (ctypes.c_int32 * len(part))(*part)
            found.append((self._lib.llama_batch_get_one(array, len(part)), array))
        return found

    def timed(
        self, work: Callable[[list[tuple[Any, Any]]], None], batches: list[tuple[Any, Any]],
        tokens: int,
    ) -> float:  # fmt: skip
        """Tokens per second of that work on an empty cache."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        begun = time.perf_counter()
        work(batches)
        return tokens / (time.perf_counter() - begun)

    def prompt(self, batches: list[tuple[Any, Any]]) -> None:
        """Read a prompt, batch by batch."""
        for batch, _ in batches:
            self._decode(batch)
        self._lib.llama_synchronize(self._context)

    def generate(self, batches: list[tuple[Any, Any]]) -> None:
        """Read tokens one by one, as a generated text's."""
        for batch, _ in batches:
            self._decode(batch)
            self._lib.llama_synchronize(self._context)

    def _decode(self, batch: Any) -> None:
        if self._lib.llama_decode(self._context, batch) != 0:
            raise SystemExit("llama.cpp failed on a batch")


def _on_devices(lines: list[str]) -> float:
    """Mebibytes of buffers that are not the processor's, as llama.cpp has logged them."""
    found = _BUFFER.findall("".join(lines))
    return sum(float(size) for name, size in found if not name.startswith("CPU"))


def _decode(text: bytes) -> str:
    return text.decode(errors="replace")


def _rate(count: int, milliseconds: float) -> float:
    """Tokens per second, 0 where llama.cpp's clock saw no time pass."""
    return 1000 * count / milliseconds if milliseconds else 0.0


def _say(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def _fail(lines: list[str]) -> int:
    errors = [line.strip() for line in lines if "error" in line or "failed" in line]
    sys.stderr.write(errors[0] if errors else "it cannot load it")
    return 1


if __name__ == "__main__":
    sys.exit(main())
