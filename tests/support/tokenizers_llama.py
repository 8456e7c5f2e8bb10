"""The real llama.cpp as the oracle for vocabularies: key-values in, token ids out.

A GGUF without tensors is written with gguf's own writer and loaded with ``vocab_only``, so nothing
of quantcli stands between the key-values and the runtime.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp

from quantcli.types import MetaValue

_TYPES = {
    "u8": gguf.GGUFValueType.UINT8,
    "i32": gguf.GGUFValueType.INT32,
    "u32": gguf.GGUFValueType.UINT32,
    "f32": gguf.GGUFValueType.FLOAT32,
    "bool": gguf.GGUFValueType.BOOL,
    "str": gguf.GGUFValueType.STRING,
}


@llama_cpp.llama_log_callback
def _swallow(level: int, text: bytes, data: Any) -> None:
    """Keep the loader's chatter out of the test log."""


llama_cpp.llama_log_set(_swallow, ctypes.c_void_p(0))


class LlamaVocabulary:
    """llama.cpp's tokenizer, made from the key-values that `load_vocabulary` gives."""

    def __init__(self, keys: Mapping[str, MetaValue], path: Path, *, name: str = "test") -> None:
        write_vocabulary(keys, path, name=name)
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise AssertionError(f"llama.cpp does not load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        data = text.encode()
        room = len(data) + 16
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(
            self.vocab, data, len(data), ids, room, add_special, parse_special
        )
        assert count >= 0
        return list(ids[:count])

    def decode(self, ids: list[int]) -> bytes:
        parts = []
        for token in ids:
            buffer = ctypes.create_string_buffer(512)
            size = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, 512, 0, True)
            assert size >= 0
            parts.append(buffer.raw[:size])
        return b"".join(parts)

    def special(self) -> dict[str, int]:
        """The ids that the runtime ends up with, by role; -1 where it has none."""
        roles = ("bos", "eos", "eot", "sep", "pad", "fim_pre", "fim_suf", "fim_mid", "fim_sep")
        return {role: getattr(llama_cpp, f"llama_vocab_{role}")(self.vocab) for role in roles}

    def ends_generation(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))


def write_vocabulary(keys: Mapping[str, MetaValue], path: Path, *, name: str = "test") -> None:
    """Write a GGUF that holds ``keys`` and the few hyperparameters that the loader insists on."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in keys.items():
        if value.kind.startswith("["):
            kind = _TYPES[value.kind[1:-1]]
            writer.add_key_value(key, list(value.value), gguf.GGUFValueType.ARRAY, sub_type=kind)
        else:
            writer.add_key_value(key, value.value, _TYPES[value.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
