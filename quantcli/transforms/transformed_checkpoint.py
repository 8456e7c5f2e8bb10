"""A transformed model as the checkpoint that would hold it: its tensors under their stored names.

A transform speaks of GGUF's tensors. A model folder keeps the checkpoint's, so each stored tensor
is put together again from the rows of the GGUF tensors that were made of it: the architecture's
pieces read backwards, rows that RoPE's layout permutes back in their places, transposed matrices
turned, what was added to a norm (Gemma's one) taken off. What no transform touches comes as it is
stored.

A head that a transform makes out of the embeddings gets the name that the architecture's table has
for it, and config.json then says that the two are not tied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from quantcli.checkpoint_view import CheckpointView, find_uses
from quantcli.model import Model, decode_rows
from quantcli.pieces import Piece
from quantcli.plan.folders import FolderPlan
from quantcli.plan.names import HEAD_NAME
from quantcli.transforms.transformed_model import TransformedModel
from quantcli.types import Note, OutputTensor, TensorInfo


def as_checkpoint(model: Model) -> Model:
    """``model`` as a checkpoint of its own, whose store holds the transformed weights.

    Planned, run and written like any checkpoint. Nothing is read.
    """
    names = _changed(model)
    stored = dict(model.store.tensors)
    own = {tensor.name: tensor for tensor in model.tensors}
    tensors = []
    for tensor in model.tensors:
        if tensor.name in names:
            if _is_new(model, tensor.name):
                tensor = _apart(model, tensor, stored)
            tensor = replace(tensor, dtype="F32", values=None)
        tensors.append(tensor)
    touched = {
        source: found
        for source, found in find_uses(tensors).items()
        if any(use.tensor.name in names for use in found)
    }
    config = dict(model.config)
    if HEAD_NAME in names and config.get("tie_word_embeddings") is not False:
        config["tie_word_embeddings"] = False

    def read(tensor: OutputTensor, start: int, stop: int) -> NDArray[Any]:
        return model.read_rows(own[tensor.name], start, stop)

    return Model(
        model.label, model.path, model.arch, model.metadata, tuple(tensors),
        CheckpointView(stored, touched, read, decode_rows, model.store), model.from_gguf, config,
        model.notes, model.repo, model.revision, model.untabled,
    )  # fmt: skip


def note_copies(model: Model, plan: FolderPlan) -> Iterator[Note]:
    """A remark on changed matrices that the folder copies, rounded to its dtype once more."""
    if not isinstance(model.store, CheckpointView):
        return
    found = [
        copy
        for copy in plan.copies
        if copy.source in model.store.uses and copy.rows > 1 and copy.dtype != "F32"
    ]
    if found:
        yield Note(
            f"{len(found)} matrices that are not quantized were transformed and are rounded to "
            f"{found[0].dtype} again, such as {found[0].name}; --dtype F32 keeps them exact"
        )


def _changed(model: Model) -> set[str]:
    """GGUF tensors that any transform of the chain changes."""
    names: set[str] = set()
    while isinstance(model, TransformedModel):
        names |= model.transform.operations.keys()
        model = model.base
    return names


def _is_new(model: Model, name: str) -> bool:
    """Whether the checkpoint has no such tensor."""
    while isinstance(model, TransformedModel):
        model = model.base
    return all(tensor.name != name for tensor in model.tensors)


def _apart(model: Model, tensor: OutputTensor, stored: dict[str, TensorInfo]) -> OutputTensor:
    """A tensor that a transform made out of another's rows, stored by itself from now on."""
    name = model.stored_names()[tensor.name]
    source = stored[tensor.pieces[0].source]
    stored[name] = replace(source, name=name)
    return replace(tensor, pieces=(Piece(name, tensor.rows),))
