"""How an embedding model makes one vector of a text's: ``{arch}.pooling_type``, and what follows.

sentence-transformers lists a model's stages in modules.json; the folder of the stage "Pooling" says
how. llama.cpp has the mean, the first and the last token. Of what comes after it has two linear
layers for EmbeddingGemma (``dense_2.weight`` and ``dense_3.weight``), from its size to another and
back, without biases and activations; other Dense stages not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.sources.files import read_json, read_json_value
from quantcli.sources.shards import open_shards
from quantcli.types import MetaValue, OutputTensor, u32

_TYPES = {"mean_tokens": 1, "cls_token": 2, "lasttoken": 3}
"""LLAMA_POOLING_TYPE_*, by the ends of the settings' names."""
_MODES = {"mean": 1, "cls": 2, "lasttoken": 3}
_HARMLESS = ("Transformer", "Pooling", "Normalize")
_DENSE = {"gemma-embedding": ("dense_2", "dense_3")}
"""The linear layers behind pooling that llama.cpp has, by architecture."""
_PLAIN = ("torch.nn.modules.linear.Identity", None)


def pooling_metadata(
    folder: Path,
    arch: str,
    known: Mapping[str, MetaValue],
    on_note: Callable[[str], None],
    dense: Sequence[OutputTensor] = (),
) -> dict[str, MetaValue]:
    """The key-values of the checkpoint in ``folder``, empty where nothing is pooled.

    ``dense`` are its linear layers behind pooling, as `dense_tensors` gives them.

    ``known`` are the model's key-values. ``on_note`` takes a sentence on each stage that llama.cpp
    does not have, and on an encoder for which nothing says how its vectors become one.
    """
    path = folder / "modules.json"
    if not path.is_file():
        causal = known.get(f"{arch}.attention.causal")
        if causal is not None and not causal.value and f"{arch}.pooling_type" not in known:
            on_note(
                f"{folder} has no modules.json, so the file does not say how the tokens' vectors "
                f"become one; --override-kv {arch}.pooling_type=int:1 takes their mean, 2 the "
                "first token's, 3 the last one's"
            )
        return {}
    stages = read_json_value(path)
    if not isinstance(stages, list):
        raise SourceError(f"{path}: holds a JSON {type(stages).__name__} where a list belongs")
    keys: dict[str, MetaValue] = {}
    for tensor in dense:
        stem = f"{arch}.{tensor.name.removesuffix('.weight')}"
        keys |= {f"{stem}_feat_in": u32(tensor.columns), f"{stem}_feat_out": u32(tensor.rows)}
    for stage in stages:
        if not isinstance(stage, dict):
            raise SourceError(f"{path}: {stage!r} is not a stage with a type and a path")
        kind = str(stage.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            found = _pooling(folder, str(stage.get("path", "")), on_note)
            keys |= {} if found is None else {f"{arch}.pooling_type": u32(found)}
        elif kind not in _HARMLESS and not (kind == "Dense" and dense):
            on_note(
                f"{path} has the stage {kind}, which llama.cpp does not have, so its embeddings "
                "are those before that stage"
            )
    return keys


def dense_tensors(folder: Path, arch: str, known: Mapping[str, MetaValue]) -> list[OutputTensor]:
    """The linear layers behind pooling, float32; none where llama.cpp does not have them all.

    ``known`` are the model's key-values.
    """
    path, names = folder / "modules.json", _DENSE.get(arch, ())
    if not names or not path.is_file():
        return []
    stages = [
        str(stage.get("path", ""))
        for stage in read_json_value(path)
        if isinstance(stage, dict) and str(stage.get("type", "")).endswith("Dense")
    ]
    if len(stages) != len(names):
        return []
    hidden = int(known[f"{arch}.embedding_length"].value)
    found, columns = [], hidden
    for name, stage in zip(names, stages, strict=True):
        weight = _linear(folder, stage)
        if weight is None or weight.shape[1] != columns:
            return []
        columns = weight.shape[0]
        found.append(OutputTensor(f"{name}.weight", weight.shape, "F32", values=weight))
    return found if columns == hidden else []


def _linear(folder: Path, stage: str) -> NDArray[np.float32] | None:
    """The matrix of a Dense stage, if it is all that there is to it."""
    settings = read_json(_inside(folder, stage) / "config.json")
    if settings.get("bias") or settings.get("activation_function") not in _PLAIN:
        return None
    if not (folder / stage / "model.safetensors").is_file():
        return None
    shards = open_shards(folder / stage)
    try:
        if set(shards.tensors) != {"linear.weight"}:
            return None
        weight: NDArray[np.float32] = shards.load("linear.weight").astype(np.float32)
        return weight
    finally:
        shards.close()


def _inside(folder: Path, stage: str) -> Path:
    if not (folder / stage).resolve().is_relative_to(folder.resolve()):
        raise SourceError(f"{folder / 'modules.json'}: the path {stage!r} leaves the folder")
    return folder / stage


def _pooling(folder: Path, stage: str, on_note: Callable[[str], None]) -> int | None:
    path = _inside(folder, stage) / "config.json"
    settings: dict[str, Any] = read_json(path)
    chosen = [
        name.removeprefix("pooling_mode_")
        for name, on in settings.items()
        if name.startswith("pooling_mode_") and on is True
    ] or [str(settings.get("pooling_mode"))]
    found = _TYPES.get(chosen[0], _MODES.get(chosen[0]))
    if len(chosen) > 1 or found is None:
        on_note(
            f"{path} pools by {' and '.join(chosen)}, which llama.cpp does not have, so it gives "
            "one vector for each token; it has mean, cls and last"
        )
        return None
    return found
