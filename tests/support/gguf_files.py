"""Small GGUF files made with the gguf library: a quantized model and an importance matrix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

MODEL_TYPES = {
    "token_embd.weight": ("Q8_0", (1000, 256)),
    "output_norm.weight": ("F32", (256,)),
    "blk.0.attn_q.weight": ("Q4_0", (256, 256)),
    "blk.0.attn_v.weight": ("IQ4_XS", (128, 256)),
    "blk.10.attn_q.weight": ("Q4_0", (256, 256)),
    "blk.2.attn_q.weight": ("F16", (256, 256)),
}
TEMPLATE = "{% for m in messages %}\n" * 10


def write_model(
    path: Path, types: Mapping[str, tuple[str, tuple[int, ...]]] = MODEL_TYPES
) -> dict[str, NDArray[np.float32]]:
    """Write a model of random weights; returns what the library decodes from each tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(11)
    writer.add_context_length(128)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"t{number}" for number in range(1000)])
    writer.add_chat_template(TEMPLATE)
    writer.add_file_type(15)
    writer.add_string("quantcli.version", "9.8.7")
    writer.add_string("quantcli.source.repo", "org/name")
    writer.add_string("quantcli.source.revision", "abc123")
    rng = np.random.default_rng(5)
    decoded = {}
    for name, (dtype, shape) in types.items():
        kind = gguf.GGMLQuantizationType[dtype]
        values = rng.standard_normal(shape).astype(np.float32)
        if dtype in ("F32", "F16"):
            stored = values.astype(np.float16 if dtype == "F16" else np.float32)
            writer.add_tensor(name, stored)
            decoded[name] = stored.astype(np.float32)
            continue
        try:
            stored = gguf.quants.quantize(values, kind)
        except NotImplementedError:
            block, nbytes = gguf.GGML_QUANT_SIZES[kind]
            row = shape[-1] // block * nbytes
            # Small bytes keep the float16 scales finite.
            stored = rng.integers(0, 60, (*shape[:-1], row)).astype(np.uint8)
        writer.add_tensor(name, stored, raw_dtype=kind)
        decoded[name] = gguf.quants.dequantize(stored, kind)
    _finish(writer)
    return decoded


def write_imatrix(
    path: Path, entries: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
) -> Path:
    """Write an importance matrix of (sums of squares, counts) of shape (n, columns) and (n, 1)."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["wiki.train.raw"])
    writer.add_uint32("imatrix.chunk_count", 40)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", counts)
    _finish(writer)
    return path


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
