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
from quantcli.archs.untabled import read_untabled
from quantcli.errors import QuantcliError, SourceError, UnknownArchitectureError
from quantcli.layouts.scaled import E4M3
from quantcli.model import Model
from quantcli.plan.filetypes import file_type_by_id
from quantcli.plan.sizes import TypeSize, size_table
from quantcli.report.facts import facts_of_config, facts_of_metadata
from quantcli.report.inspection import StoredTensor, Subject, holds_weights
from quantcli.report.tokenizer import kind_in_folder, kind_in_gguf
from quantcli.report.weights import WeightSource
from quantcli.sources.files import WEIGHT_DTYPES
from quantcli.sources.gguf import GgufCheckpoint
from quantcli.sources.hf import HfCheckpoint, read_config
from quantcli.sources.remote import open_found_gguf, open_found_shards
from quantcli.sources.resolve import Resolved
from quantcli.sources.shards import Shards
from quantcli.types import MetaValue, OutputTensor, PackedType, TensorStore, text

_ONCE_QUANTIZED = frozenset({"F64", "F32", "F16", "BF16", "Q8_0"})
"""Stored types that may be quantized without a second loss worth speaking of."""


def open_subject(found: Resolved, label: str, *, weights: bool = False) -> Subject:
    """Open a checkpoint or a GGUF, of the Hub too; SourceError when its files are broken.

    ``weights``: those that are not on this machine are to be read as well.
    """
    is_remote = found.is_remote and not weights
    if found.kind == "gguf":
        return _from_gguf(open_found_gguf(found), label, is_remote=is_remote)
    shards = open_found_shards(found)
    try:
        return _from_shards(shards, found.path, label, is_remote=is_remote)
    except BaseException:
        shards.close()
        raise


def _from_gguf(store: GgufCheckpoint, label: str, *, is_remote: bool) -> Subject:
    keys = store.metadata
    outputs = _as_outputs(store)
    notes: list[str] = []
    sizes: tuple[TypeSize, ...] = ()
    if all(t.dtype in _ONCE_QUANTIZED or not holds_weights(t.dtype) for t in outputs):
        sizes = _sizes(outputs, keys, notes, from_gguf=True)
    model, pre = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.pre")
    number = keys["general.file_type"].value if "general.file_type" in keys else None
    file_type = file_type_by_id(number) if isinstance(number, int) else None
    return Subject(
        kind="gguf",
        label=label,
        files=store.file_sizes,
        facts=facts_of_metadata(keys),
        tensors=tuple(map(StoredTensor, store.tensors.values())),
        outputs=outputs,
        tokenizer=kind_in_gguf(str(model.value)) if model is not None else None,
        pre_tokenizer=str(pre.value) if pre is not None else None,
        file_type=file_type.name if file_type is not None else None,
        metadata=keys,
        model_keys=keys,
        sizes=sizes,
        notes=tuple(notes),
        sources=() if is_remote else _stored_sources(store, holds_weights),
        close=store.close,
    )


def _from_shards(shards: Shards, path: Path, label: str, *, is_remote: bool) -> Subject:
    sizes = {file.path: file.size for file in shards.files}
    try:
        store = HfCheckpoint(path, read_config(path), shards)
    except SourceError as error:
        return _listing(shards, path, label, error)
    notes: list[str] = []
    try:
        architecture = find_architecture(store.config)
        outputs = tuple(architecture.tensors(store.config, store.tensors))
        keys = {"general.architecture": text(architecture.name)}
        keys |= architecture.metadata(
            store.config, None if is_remote else store, stored=store.tensors
        )
    except UnknownArchitectureError:
        notes.append(_untabled(store))
        outputs, keys = (), {}
    except QuantcliError as error:
        notes.append(_unknown(error))
        outputs, keys = (), {}
    sources: tuple[WeightSource, ...] = ()
    if not is_remote:
        sources = (
            _output_sources(store, path, keys, outputs)
            if outputs
            else _stored_sources(store, _is_readable)
        )
    return Subject(
        kind="checkpoint",
        label=label,
        files=sizes,
        facts=facts_of_metadata(keys, store.config) if keys else facts_of_config(store.config),
        tensors=_stored_tensors(store, outputs),
        outputs=outputs,
        model_keys=keys,
        tokenizer=kind_in_folder(path),
        sizes=_sizes(outputs, keys, notes, from_gguf=False) if keys else (),
        notes=tuple(notes),
        sources=sources,
        close=store.close,
    )


def _listing(shards: Shards, path: Path, label: str, why: SourceError) -> Subject:
    """A checkpoint whose weights are stored in a way that is not read: names and shapes only."""
    try:
        config: Mapping[str, Any] = read_config(path)
    except SourceError:
        config = {}
    return Subject(
        kind="checkpoint",
        label=label,
        files={file.path: file.size for file in shards.files},
        facts=facts_of_config(config),
        tensors=tuple(map(StoredTensor, shards.tensors.values())),
        tokenizer=kind_in_folder(path),
        notes=(_unknown(why),),
        close=shards.close,
    )


def _is_readable(dtype: str) -> bool:
    """Whether a checkpoint's tensors of this dtype can be read as numbers."""
    return isinstance(dtype, PackedType) or dtype in WEIGHT_DTYPES or dtype == E4M3


def _unknown(why: QuantcliError) -> str:
    return f"{why.message}; so its tensors are only listed as they are stored"


def _untabled(store: HfCheckpoint) -> str:
    found = read_untabled(store.config, store.tensors)
    matrices = sum(len(tensor.pieces) for tensor in found.tensors)
    return (
        f"{found.remark}; there are {matrices} with the embedding and the head, which model "
        "folders can hold, but the sizes of GGUF types cannot be told"
    )


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


def _output_sources(
    store: HfCheckpoint,
    path: Path,
    keys: Mapping[str, MetaValue],
    outputs: tuple[OutputTensor, ...],
) -> tuple[WeightSource, ...]:
    arch = str(keys["general.architecture"].value)
    model = Model(str(path), path, arch, keys, outputs, store, from_gguf=False)
    return tuple(
        WeightSource(t.name, t.shape, t.dtype, model.stored_bytes(t), partial(model.read_rows, t))
        for t in outputs
        if t.values is None and t.elements
    )
