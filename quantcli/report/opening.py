"""Opens what ``inspect`` was pointed at, from headers alone.

A checkpoint of an architecture that quantcli knows shows everything; any other is still listed as
it is stored, with a note that says what could not be told and why. Only broken files are an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from quantcli.archs import find_architecture
from quantcli.errors import QuantcliError, SourceError
from quantcli.model import Model
from quantcli.plan.filetypes import file_type_by_id
from quantcli.plan.sizes import TypeSize, size_table
from quantcli.report.facts import facts_of_config, facts_of_metadata
from quantcli.report.subject import StoredTensor, Subject, holds_weights
from quantcli.report.tokenizer import kind_in_folder, kind_in_gguf
from quantcli.report.weights import WeightSource
from quantcli.sources import fp8
from quantcli.sources.files import WEIGHT_DTYPES
from quantcli.sources.gguf import open_gguf
from quantcli.sources.hf import HfCheckpoint, open_checkpoint, read_config
from quantcli.sources.shards import open_shards
from quantcli.types import MetaValue, OutputTensor, TensorStore, text

_ONCE_QUANTIZED = frozenset({"F64", "F32", "F16", "BF16", "Q8_0"})
"""Stored types that may be quantized without a second loss worth speaking of."""

_READABLE = frozenset({*WEIGHT_DTYPES, fp8.DTYPE})
"""Dtypes of a checkpoint whose tensors can be read as numbers."""


def open_model_file(path: Path, label: str) -> Subject:
    """Open a GGUF; SourceError when it is broken."""
    store = open_gguf(path)
    keys = store.metadata
    outputs = _as_outputs(store)
    notes: list[str] = []
    sizes: tuple[TypeSize, ...] = ()
    if all(t.dtype in _ONCE_QUANTIZED or not holds_weights(t.dtype) for t in outputs):
        sizes = _sizes(outputs, keys, notes, from_gguf=True)
    model, pre, number = (
        keys.get(key) for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre", "general.file_type")
    )
    file_type = file_type_by_id(int(number.value)) if number is not None else None
    return Subject(
        kind="gguf",
        label=label,
        files=store.files,
        facts=facts_of_metadata(keys),
        tensors=tuple(map(StoredTensor, store.tensors.values())),
        outputs=outputs,
        tokenizer=kind_in_gguf(str(model.value)) if model is not None else None,
        pre_tokenizer=str(pre.value) if pre is not None else None,
        file_type=file_type.name if file_type is not None else None,
        metadata=keys,
        sizes=sizes,
        notes=tuple(notes),
        sources=_stored_sources(store, holds_weights),
        close=store.close,
    )


def open_folder(path: Path, label: str) -> Subject:
    """Open a checkpoint folder; SourceError when its weights or index are broken."""
    try:
        store = open_checkpoint(path)
    except SourceError as error:
        return _open_listing(path, label, error)
    notes: list[str] = []
    try:
        architecture = find_architecture(store.config)
        outputs = tuple(architecture.tensors(store.config, store.tensors))
        keys = {"general.architecture": text(architecture.name)}
        keys |= architecture.metadata(store.config)
    except QuantcliError as error:
        notes.append(_unknown(error))
        outputs, keys = (), {}
    model = Model(
        label, path, str(keys["general.architecture"].value) if keys else "", keys, outputs,
        store, from_gguf=False, config=store.config,
    )  # fmt: skip
    return Subject(
        kind="checkpoint",
        label=label,
        files=store.files,
        facts=facts_of_metadata(keys, store.config) if keys else facts_of_config(store.config),
        tensors=_stored_tensors(store, outputs),
        outputs=outputs,
        tokenizer=kind_in_folder(path),
        sizes=_sizes(outputs, keys, notes, from_gguf=False) if keys else (),
        notes=tuple(notes),
        sources=_output_sources(model)
        if outputs
        else _stored_sources(store, _READABLE.__contains__),
        close=store.close,
    )


def _open_listing(path: Path, label: str, why: SourceError) -> Subject:
    """A checkpoint whose weights are stored in a way that is not read: names and shapes only."""
    shards = open_shards(path)
    shards.close()
    try:
        config: Mapping[str, Any] = read_config(path)
    except SourceError:
        config = {}
    return Subject(
        kind="checkpoint",
        label=label,
        files=tuple(file.path for file in shards.files),
        facts=facts_of_config(config),
        tensors=tuple(map(StoredTensor, shards.tensors.values())),
        tokenizer=kind_in_folder(path),
        notes=(_unknown(why),),
    )


def _unknown(why: QuantcliError) -> str:
    return f"{why.message}; so its tensors are only listed as they are stored"


def _as_outputs(store: TensorStore) -> tuple[OutputTensor, ...]:
    return tuple(OutputTensor(t.name, t.shape, t.dtype) for t in store.tensors.values())


def _sizes(
    outputs: tuple[OutputTensor, ...],
    keys: Mapping[str, MetaValue],
    notes: list[str],
    *,
    from_gguf: bool,
) -> tuple[TypeSize, ...]:
    try:
        return tuple(size_table(outputs, keys, from_gguf=from_gguf))
    except QuantcliError as error:
        notes.append(f"{error.message}; so the sizes of other types cannot be told")
        return ()


def _stored_tensors(
    store: HfCheckpoint, outputs: Iterable[OutputTensor]
) -> tuple[StoredTensor, ...]:
    """Every stored tensor with its GGUF names, in the order in which the model uses them."""
    becomes: dict[str, list[str]] = defaultdict(list)
    for output in outputs:
        for piece in output.pieces:
            if output.name not in becomes[piece.source]:
                becomes[piece.source].append(output.name)
    order = [*becomes, *(name for name in store.tensors if name not in becomes)]
    return tuple(StoredTensor(store.tensors[name], tuple(becomes.get(name, ()))) for name in order)


def _stored_sources(
    store: TensorStore, is_readable: Callable[[str], bool]
) -> tuple[WeightSource, ...]:
    return tuple(
        WeightSource(t.name, t.shape, t.dtype, t.nbytes, partial(store.read_rows, t.name))
        for t in store.tensors.values()
        if is_readable(t.dtype) and t.elements
    )


def _output_sources(model: Model) -> tuple[WeightSource, ...]:
    return tuple(
        WeightSource(t.name, t.shape, t.dtype, model.stored_bytes(t), partial(model.read_rows, t))
        for t in model.tensors
        if t.values is None and t.elements
    )
