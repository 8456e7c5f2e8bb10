"""The small files of a model folder: configuration, tokenizer, index, manifest and card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantcli import __version__
from quantcli.artifacts.atomic_folder import MANIFEST
from quantcli.artifacts.model_card import describe_folder, render_card
from quantcli.artifacts.safetensors_shards import SafetensorsShards
from quantcli.artifacts.slabs import UNFINISHED
from quantcli.artifacts.static_scales import cache_scales
from quantcli.errors import SourceError
from quantcli.layouts.base import FolderFacts, FolderPart
from quantcli.layouts.settings import QUANTIZATION_KEYS
from quantcli.model import TRANSFORMS_KEY, Model
from quantcli.plan.folders import FolderPlan
from quantcli.plan.recipe_file import dump_recipe, recorded
from quantcli.plan.schemes import DTYPES, Scheme
from quantcli.plan.text_file import read_template
from quantcli.sources.card import CARD
from quantcli.whole_files import read_whole

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
_TEMPLATE = "chat_template.jinja"
"""It goes before a template in tokenizer_config.json."""
_OWN = (
    CONFIG,
    MANIFEST,
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
            files[path.name] = read_whole(path)
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror or error}") from error
    return files


def index_files(weights: SafetensorsShards) -> dict[str, bytes]:
    """The index of tensors over files, by its name; nothing where there is one file."""
    if len(weights.layouts) < 2:
        return {}
    places = {name: file for name, (file, _, _) in sorted(weights.places.items())}
    return {
        INDEX: to_json({"metadata": {"total_size": weights.tensor_bytes}, "weight_map": places})
    }


def _describe_part(plan: FolderPlan, scheme: Scheme) -> FolderPart:
    modules = [item.matrix.module for item in plan.items if item.scheme == scheme]
    return FolderPart(scheme.grid, scheme.packing, scheme.described_inputs, modules)


def to_json(value: Mapping[str, Any]) -> bytes:
    """A JSON file."""
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair is an escape in the source too: UTF-8 has no bytes for it.
        return (json.dumps(value, indent=2) + "\n").encode()


def make_settings(model: Model, plan: FolderPlan, weights: SafetensorsShards) -> dict[str, bytes]:
    """Every file but the weights, by name; `UNFINISHED` stands for the digest in the manifest."""
    files = read_settings(model.path)
    if plan.recipe.chat_template:
        files[_TEMPLATE] = read_template(plan.recipe.chat_template).encode()
    recipe = recorded(plan.recipe)
    config = without_quantization(model.config)
    if plan.recipe.dtype is not None or not plan.schemes:
        config = _with_dtype(config, DTYPES[plan.dtype])
    if plan.schemes or plan.caches:
        parts = [_describe_part(plan, scheme) for scheme in plan.schemes]
        subject = FolderFacts(config, parts, plan.kept)
        if plan.caches:
            cache = cache_scales(plan)
            subject = replace(subject, cache=cache.settings)
            config |= cache.describe(subject)
        if parts:
            config |= parts[0].packing.describe(subject)
    files[CONFIG] = to_json(config)
    files |= index_files(weights)
    source = {"repo": model.repo, "revision": model.revision, "digest": UNFINISHED}
    text = dump_recipe(recipe)
    manifest: dict[str, Any] = {
        "schema": "quantcli.manifest/1",
        "quantcli": __version__,
        "to": recipe.to,
        "recipe": text,
        "source": {key: value for key, value in source.items() if value is not None},
    }
    if TRANSFORMS_KEY in model.metadata:
        manifest["transforms"] = json.loads(str(model.metadata[TRANSFORMS_KEY].value))
    files[MANIFEST] = to_json(manifest)
    stored = weights.tensor_bytes
    card = describe_folder(
        model.path,
        name=model.repo or model.path.resolve().name,
        repo=model.repo,
        to=recipe.to,
        weights=plan.label + (", key-value cache in FP8" if plan.caches else ""),
        recipe=text,
        nbytes=stored,
        bits=8 * stored / max(1, plan.elements),
    )
    files[CARD] = render_card(card)
    return dict(sorted(files.items()))


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what it, or the one of its text model, says of quantized weights.

    Other storages than the output's may have their settings under another key.
    """
    kept = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    text_config = kept.get("text_config")
    if isinstance(text_config, Mapping):
        kept["text_config"] = without_quantization(text_config)
    return kept


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration, and those inside of it, for weights of another dtype."""
    changed = dict(config)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            changed[key] = dtype
        elif key.endswith("_config") and isinstance(value, Mapping):
            changed[key] = _with_dtype(value, dtype)
    return changed
