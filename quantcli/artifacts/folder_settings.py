"""The files of a model folder beside its weights: the tokenizer's and others copied, the index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from quantcli.errors import SourceError

CONFIG, INDEX = "config.json", "model.safetensors.index.json"

_COPIED = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "*.py",
    "LICENSE*",
)
_OWN = (
    CONFIG,
    "quantcli.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
)
"""What describes the source's weights, not the output's."""


def read_settings(folder: Path) -> dict[str, bytes]:
    """What a folder's tokenizer, template, generation and processing need, by file name."""
    paths = {path for pattern in _COPIED for path in folder.glob(pattern)}
    files = {}
    for path in sorted(paths):
        if path.name in _OWN or path.name.endswith(".index.json") or not path.is_file():
            continue
        try:
            files[path.name] = path.read_bytes()
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror or error}") from error
    return files


def shard_names(count: int) -> list[str]:
    """File names of ``count`` shards, as transformers calls them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]


def write_index(places: Mapping[str, str], total: int) -> bytes:
    """The index of tensors over shards; ``total`` is the bytes of all tensors."""
    body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode()
