"""The process in which llama.cpp's speed is measured: one file, a line of JSON for each run.

By itself, so that its memory is that of this file alone, and that a processor on which llama.cpp's
repacked code crashes costs a run and not the evaluation. What is run is what llama-bench runs:
random tokens, a prompt of so many, then as many steps of one token each, on an empty cache, once
before for warmth. Source: ``test_prompt`` and ``test_gen`` of tools/llama-bench/llama-bench.cpp.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable
from typing import Any

from quantcli.systems import resident_memory

_BUFFER = re.compile(r"(\S+) +(?:model|KV|RS|compute|output) buffer size = +([\d.]+) MiB")
_BATCH, _UBATCH = 2048, 512


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
    options = lib.llama_context_default_params()
    options.n_ctx = asked["prompt"] + asked["generation"]
    options.n_batch, options.n_ubatch = _BATCH, _UBATCH
    options.n_threads = options.n_threads_batch = asked["threads"]
    options.swa_full = False
    options.no_perf = False
    context = lib.llama_init_from_model(model, options)
    if not context:
        return _fail(lines)
    run = _Run(lib, model, context)
    run.prompt(min(asked["prompt"], _UBATCH))
    run.generate(1)
    for _ in range(asked["runs"]):
        lib.llama_perf_context_reset(context)
        prompt = run.timed(run.prompt, asked["prompt"])
        generation = run.timed(run.generate, asked["generation"])
        own = lib.llama_perf_context(context)
        _say(
            prompt=prompt,
            generation=generation,
            own_prompt=_rate(own.n_p_eval, own.t_p_eval_ms),
            own_generation=_rate(own.n_eval, own.t_eval_ms),
        )
    elsewhere = sum(
        float(size) for name, size in _BUFFER.findall("".join(lines)) if not name.startswith("CPU")
    )
    _say(resident=max(0, resident_memory() - before), device=round(elsewhere * 2**20))
    # What llama.cpp frees at exit is the system's to free.
    sys.stdout.flush()
    os._exit(0)


class _Run:
    def __init__(self, lib: Any, model: Any, context: Any) -> None:
        self._lib, self._context = lib, context
        vocab = lib.llama_model_get_vocab(model)
        self._size = int(lib.llama_vocab_n_tokens(vocab))
        adds = lib.llama_vocab_get_add_bos(vocab)
        self._begin = int(lib.llama_vocab_bos(vocab)) if adds else None
        self._random = random.Random(0)

    def timed(self, work: Callable[[int], None], tokens: int) -> float:
        """Tokens per second of that work on an empty cache."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        begun = time.perf_counter()
        work(tokens)
        return tokens / (time.perf_counter() - begun)

    def prompt(self, count: int) -> None:
        """Read random tokens, batch by batch."""
        for start in range(0, count, _BATCH):
            tokens = [self._token() for _ in range(min(_BATCH, count - start))]
            if start == 0 and self._begin is not None:
                tokens[0] = self._begin
            self._decode(tokens)
        self._lib.llama_synchronize(self._context)

    def generate(self, count: int) -> None:
        """Read random tokens one by one, as a generated text's."""
        token = self._token() if self._begin is None else self._begin
        for _ in range(count):
            self._decode([token])
            self._lib.llama_synchronize(self._context)
            token = self._token()

    def _token(self) -> int:
        return self._random.randrange(self._size)

    def _decode(self, tokens: list[int]) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self._lib.llama_batch_get_one(array, len(tokens))
        if self._lib.llama_decode(self._context, batch) != 0:
            raise SystemExit("llama.cpp failed on a batch")


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
