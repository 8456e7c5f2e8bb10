"""A model without its blocks for multi-token prediction: what ``--no-mtp`` does.

Tensors and key-values go, and of a checkpoint the stored tensors too, so that a model folder does
not copy what it was to be without; its config.json then names none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantcli.archs import find_architecture
from quantcli.archs.mtp import drop_blocks
from quantcli.checkpoint_view import CheckpointView
from quantcli.model import Model, decode_rows
from quantcli.types import Note


def drop_mtp(model: Model) -> Model:
    """The model without these blocks; with a note if it has none. Nothing is read."""
    dropped = model.mtp_tensors
    if not dropped:
        note = Note("--no-mtp has no effect: the model has no block for multi-token prediction")
        return replace(model, notes=(*model.notes, note))
    names = {tensor.name for tensor in dropped}
    found = replace(
        model,
        metadata=drop_blocks(model.arch, model.metadata),
        tensors=tuple(tensor for tensor in model.tensors if tensor.name not in names),
    )
    if model.from_gguf:
        return found
    stored = {piece.source for tensor in dropped for piece in tensor.pieces}
    kept = {name: info for name, info in model.store.tensors.items() if name not in stored}
    store = CheckpointView(kept, {}, found.read_rows, decode_rows, model.store)
    mtp = find_architecture(model.config).mtp
    config = model.config if mtp is None else _without(model.config, mtp.key)
    return replace(found, store=store, config=config)


def _without(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The configuration, and the text model's inside of it, with no such blocks."""
    changed = dict(config)
    if key in config:
        changed[key] = 0
    if isinstance(config.get("text_config"), Mapping):
        changed["text_config"] = _without(config["text_config"], key)
    return changed
