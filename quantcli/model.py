"""A model as the rest of quantcli sees it: GGUF key-values, tensors under GGUF names, their rows.

A checkpoint folder goes through its architecture's table and its tokenizer files; a GGUF is taken
as it is. Only headers and tokenizer files are read here, weights when `Model.read_rows` asks.
Where no GGUF is to be made, a checkpoint may do without a table (`quantcli.archs.untabled`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from quantcli.archs import find_architecture
from quantcli.archs.encoder import RANK
from quantcli.archs.mtp import count_blocks
from quantcli.archs.untabled import Untabled, read_untabled
from quantcli.errors import (
    ArchitectureError,
    MismatchError,
    PlanError,
    SourceError,
    UnknownArchitectureError,
    VocabularyError,
)
from quantcli.formats import FORMATS, get_format, native
from quantcli.formats.base import Floats
from quantcli.pieces import Piece, read_scattered
from quantcli.reranker import PROMPT_KEY, find_reranker
from quantcli.sources.address import is_remote
from quantcli.sources.resolve import Resolved, resolve
from quantcli.tied_head import without_equal_head
from quantcli.types import (
    BlockStore,
    MetaValue,
    Note,
    OutputTensor,
    PackedType,
    TensorInfo,
    TensorStore,
    row_count,
    text,
)

if TYPE_CHECKING:
    from quantcli.sources.hf import HfCheckpoint

TRANSFORMS_KEY = "quantcli.transforms"
"""Key-value of a model whose weights are transformed as they are read: what was done, as JSON."""


@dataclass(frozen=True)
class Model(AbstractContextManager["Model"]):
    """An opened model; a context manager that closes its files.

    ``metadata`` holds every key-value except those that describe a quantization; ``config`` is
    the checkpoint's config.json, empty for a GGUF; ``notes`` say what llama.cpp does differently.
    Of a checkpoint without a table, ``untabled`` is what stands in its place, and ``tensors`` are
    only those that may be quantized.
    """

    label: str
    path: Path
    arch: str
    metadata: Mapping[str, MetaValue]
    tensors: tuple[OutputTensor, ...]
    store: TensorStore
    from_gguf: bool
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    repo: str | None = None
    revision: str | None = None
    untabled: Untabled | None = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.store.close()

    def value(self, key: str, default: Any = None) -> Any:
        """The key-value ``{arch}.key``, or ``default``."""
        found = self.metadata.get(f"{self.arch}.{key}")
        return default if found is None else found.value

    def count(self, key: str) -> int:
        """The number ``{arch}.key``, 0 where there is none; SourceError for what is no number."""
        value = self.value(key, 0)
        if isinstance(value, bool) or not isinstance(value, int):
            raise SourceError(
                f"{self.path}: the key-value {self.arch}.{key} is {value!r}; a number belongs there"
            )
        return value

    @property
    def is_remote(self) -> bool:
        """Whether each read of weights is a request over the network."""
        return any(is_remote(info.file) for info in islice(self.store.tensors.values(), 1))

    @property
    def mtp_blocks(self) -> range:
        """The numbers of the blocks for multi-token prediction, which follow the last layer."""
        return count_blocks(self.arch, self.metadata)

    @property
    def mtp_tensors(self) -> tuple[OutputTensor, ...]:
        """The tensors of these blocks, which transformers does not run."""
        blocks = tuple(f"blk.{index}." for index in self.mtp_blocks)
        return tuple(tensor for tensor in self.tensors if tensor.name.startswith(blocks))

    def require_next_token(self, purpose: str) -> None:
        """ArchitectureError where the model is an encoder, a decoder behind one, or a classifier.

        ``purpose`` ends the sentence "..., so it cannot be ...".
        """
        alone = self.value("attention.causal") is False
        if not alone and self.value("pooling_type") == RANK and PROMPT_KEY not in self.metadata:
            raise ArchitectureError(
                f"{self.label} is a classifier, which predicts no next token, so it cannot be "
                f"{purpose}"
            )
        if alone or self.value("decoder_start_token_id") is not None:
            what = "an encoder that predicts" if alone else "whose encoder predicts"
            raise ArchitectureError(
                f"{self.label} is a {self.arch} model, {what} no next token, so it cannot be "
                f"{purpose}"
            )

    def stored_names(self) -> Mapping[str, str]:
        """GGUF's names and a checkpoint's own, patterns over experts ``{e}``."""
        if self.untabled is not None:
            return self.untabled.sources
        return find_architecture(self.config).sources(self.config, self.store.tensors)

    def stored_bytes(self, tensor: OutputTensor) -> int:
        """Bytes that are read from the source to make ``tensor``."""
        total = 0
        for piece in tensor.pieces:
            info = self.store.tensors[piece.source]
            values = piece.rows * (tensor.columns if tensor.shape else 1)
            total += info.nbytes * values // max(1, info.elements)
        return total

    def read_rows(self, tensor: OutputTensor, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start:stop`` of ``tensor``, shape (stop-start, columns), in the stored dtype.

        Block formats come as uint8 of shape (rows, bytes per row); values that are computed or
        shifted come as float32.
        """
        if tensor.values is not None:
            return np.array(tensor.values.reshape(tensor.rows, -1)[start:stop])
        parts = []
        first = 0
        for piece in tensor.pieces:
            low, high = max(start, first), min(stop, first + piece.rows)
            if low < high:
                parts.append(self._read_piece(piece, low - first, high - first))
            first += piece.rows
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_floats(self, tensor: OutputTensor, start: int, stop: int) -> Floats:
        """The same rows as float32, decoded where they are stored in blocks."""
        return decode_rows(tensor, self.read_rows(tensor, start, stop))

    def origin(self, tensor: OutputTensor, row: int, column: int) -> tuple[TensorInfo, int, int]:
        """The stored tensor, its row and its column behind a place in ``tensor``, for messages."""
        for piece in tensor.pieces:
            if row < piece.rows:
                break
            row -= piece.rows
        return self.store.tensors[piece.source], *piece.origin(row, column)

    def holds_blocks(self, source: str) -> bool:
        """Whether a stored stack is in GGUF's blocks, by columns."""
        return isinstance(self.store, BlockStore) and source in self.store.blocks

    def _read_piece(self, piece: Piece, start: int, stop: int) -> NDArray[Any]:
        read = partial(self.store.read_rows, piece.source)
        columns = piece.source_columns()
        if columns is not None and self.holds_blocks(piece.source):
            blocks = partial(cast("BlockStore", self.store).read_blocks, piece.source)
            return read_scattered(blocks, columns[start:stop])
        if piece.order is None:
            rows = read(piece.start + start, piece.start + stop)
        elif piece.keeps_rows:
            rows = read_scattered(read, piece.source_rows(start, stop))
        elif piece.transposes and len(self.store.tensors[piece.source].shape) == 2:
            rows = self.store.read_columns(piece.source, start, stop)
        else:
            made, stored = piece.group
            first, last = start // made, -(-stop // made)
            block = read(piece.start + first * stored, piece.start + last * stored)
            found = piece.arrange(block)[start - first * made : stop - first * made]
            rows = np.ascontiguousarray(found)
        values: NDArray[Any] = piece.apply(rows)
        return values


def open_model(
    target: str | Path,
    *,
    pre: str | None = None,
    vocabulary: bool = True,
    table: bool = True,
    gguf_only: bool = False,
    ignored: Sequence[str] = (),
    template: str | None = None,
    download: bool = False,
    found: Resolved | None = None,
    on_progress: Callable[..., None] | None = None,
) -> Model:
    """Open a folder, a repo id, an ``hf://`` address or a GGUF.

    Of the Hub, the weights are read where they are, or with ``download`` stored in its cache.
    ``found`` is what ``target`` was resolved to, where that is known.

    ``pre`` names the pre-tokenizer instead of recognising it; ``vocabulary=False`` leaves the
    tokenizer's key-values out. ``table=False``: a checkpoint may be of a family without a table, or
    have a tokenizer that llama.cpp has not. ``gguf_only``: a stored head that equals the embeddings
    of a tied model is left out, which reads both once. Stored tensors that a pattern in ``ignored``
    matches are left out; ``template`` takes the place of the chat template. Raises a SourceError
    that says what is wrong with the files, a PlanError for a pattern that matches nothing.
    """
    found = found or resolve(str(target), on_progress=on_progress, weights=download)
    if found.kind == "gguf":
        return _open_gguf(str(target), found, ignored, template)
    if found.kind != "checkpoint":
        raise SourceError(
            f"{found.path} is not a model", hint="give a checkpoint folder, a repo id or a GGUF"
        )
    wish = _Wish(pre, vocabulary, table, tuple(ignored), template)
    model = _open_checkpoint(str(target), found, wish)
    return for_gguf(model) if gguf_only else model


def for_gguf(model: Model) -> Model:
    """The model as a GGUF alone would hold it: without a head that equals the embeddings of a tied
    model, with what a reranker needs; see `open_model`'s ``gguf_only``."""
    if model.from_gguf or model.untabled is not None:
        return model
    model = _without_equal_head(model)
    names = (model.path.name, model.repo or "", str(model.metadata["general.name"].value))
    found = find_reranker(names, model.arch, model.metadata, model.tensors)
    if found is None:
        return model
    return replace(
        model,
        tensors=(*model.tensors, found.tensor),
        metadata={**model.metadata, **found.metadata},
        notes=(*model.notes, Note(found.remark)),
    )


def _without_equal_head(model: Model) -> Model:
    if not find_architecture(model.config).is_tied(model.config):
        return model
    tensors, remark = without_equal_head(model.tensors, model.store)
    if remark is None:
        return model
    return replace(model, tensors=tuple(tensors), notes=(*model.notes, Note(remark)))


@dataclass(frozen=True, slots=True)
class _Wish:
    """How a checkpoint is to be opened: `open_model`'s arguments."""

    pre: str | None
    vocabulary: bool
    table: bool
    ignored: tuple[str, ...]
    template: str | None


def _open_checkpoint(label: str, found: Resolved, wish: _Wish) -> Model:
    from quantcli.sources.remote import open_found_checkpoint

    store = open_found_checkpoint(found)
    try:
        left = _ignored_names(store.tensors, wish.ignored)
        store.leave_out(left)
        try:
            return _with_table(label, found, store, wish)
        except MismatchError as lack:
            if any(name in lack.message for name in left):
                raise MismatchError(lack.message, hint="--ignore-tensor leaves it out") from lack
            raise
        except ArchitectureError as unknown:
            if wish.table:
                raise
            return _without_table(label, found, store, unknown)
    except BaseException:
        store.close()
        raise


def _ignored_names(stored: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The stored names that ``patterns`` match; PlanError for one that matches none."""
    names: set[str] = set()
    for pattern in patterns:
        found = {name for name in stored if re.search(pattern, name)}
        if not found:
            raise PlanError(
                f"--ignore-tensor {pattern} matches no stored tensor",
                hint="'quantcli inspect MODEL --tensors' lists them",
            )
        names |= found
    return names


def _with_table(label: str, found: Resolved, store: HfCheckpoint, wish: _Wish) -> Model:
    from quantcli.sources.card import count_parameters, general_metadata
    from quantcli.sources.pooling import dense_tensors, pooling_metadata
    from quantcli.sources.shards import adapter_notes
    from quantcli.vocab import load_vocabulary

    architecture = find_architecture(store.config)
    tensors = [_in_blocks(t, store) for t in architecture.tensors(store.config, store.tensors)]
    sentences = list(architecture.notes(store.config, store.tensors))
    keys = {"general.architecture": text(architecture.name)}
    keys |= general_metadata(
        found.path,
        config=store.config,
        parameters=count_parameters(tensors),
        name=found.repo,
        on_note=sentences.append,
    )
    keys |= architecture.metadata(store.config, store)
    dense = dense_tensors(found.path, architecture.name, keys)
    keys |= pooling_metadata(found.path, architecture.name, keys, sentences.append, dense)
    sentences += adapter_notes(found.path)
    if wish.vocabulary:
        size = int(keys[f"{architecture.name}.vocab_size"].value)
        try:
            keys |= load_vocabulary(
                found.path,
                store.config,
                vocab_size=size,
                pre=wish.pre,
                template=wish.template,
                name=str(keys["general.name"].value),
                on_note=sentences.append,
            )
        except VocabularyError:
            if wish.table:
                raise
    notes = tuple(Note(sentence, "warning") for sentence in sentences)
    return Model(
        label, found.path, architecture.name, keys, (*tensors, *dense), store, from_gguf=False,
        config=store.config, notes=notes,
        repo=found.repo, revision=found.revision,
    )  # fmt: skip


def _without_table(
    label: str, found: Resolved, store: HfCheckpoint, why: ArchitectureError
) -> Model:
    """The checkpoint as its own tensors show it; ``why`` is what the table said of it."""
    free = read_untabled(store.config, store.tensors)
    if not isinstance(why, UnknownArchitectureError):
        free = replace(free, refused=why.message)
    return Model(
        label, found.path, free.name, free.keys, free.tensors, store, from_gguf=False,
        config=store.config, notes=(Note(free.remark),),
        repo=found.repo, revision=found.revision, untabled=free,
    )  # fmt: skip


def open_tower(
    target: str | Path,
    *,
    download: bool = False,
    on_progress: Callable[..., None] | None = None,
) -> Model:
    """Open the vision or audio tower of a wrapper's checkpoint as llama.cpp's mmproj.

    Raises a SourceError for what is no checkpoint, an ArchitectureError where there is no tower
    that quantcli knows.
    """
    from quantcli.sources.remote import open_found_checkpoint

    found = resolve(str(target), on_progress=on_progress, weights=download)
    if found.kind != "checkpoint":
        raise SourceError(
            f"{found.path} is no checkpoint, so it holds no tower beside its text model",
            hint="name the folder or the repository of the original model",
        )
    store = open_found_checkpoint(found)
    try:
        return _tower(str(target), found.path, store, store.config, found.repo, found.revision)
    except BaseException:
        store.close()
        raise


def tower_of(model: Model) -> Model:
    """The tower beside the text ``model``, read from the same files, which stay the model's."""
    if model.from_gguf:
        raise SourceError(
            f"{model.path} is a GGUF, which holds no tower beside its text model",
            hint="name the folder or the repository of the original model",
        )
    return _tower(model.label, model.path, model.store, model.config, model.repo, model.revision)


def _tower(
    label: str, path: Path, store: TensorStore, config: Mapping[str, Any],
    repo: str | None, revision: str | None,
) -> Model:  # fmt: skip
    from quantcli.archs.towers import CLIP, Wrapper, find_tower
    from quantcli.sources.card import general_metadata
    from quantcli.sources.processor import find_added_token, read_processor

    tower = find_tower(config)
    wrapper = Wrapper(config, read_processor(path), partial(find_added_token, path))
    tensors = tower.tensors(wrapper, store.tensors)
    sentences = list(tower.read_notes(wrapper))
    keys = {"general.architecture": text(CLIP)}
    keys |= general_metadata(
        path, config=config, parameters=sum(tensor.elements for tensor in tensors), name=repo,
        on_note=sentences.append,
    )  # fmt: skip
    keys["general.type"] = text("mmproj")
    keys |= tower.metadata(wrapper)
    notes = tuple(Note(sentence, "warning") for sentence in sentences)
    return Model(
        label, path, CLIP, keys, tuple(tensors), store, from_gguf=False,
        config=config, notes=notes, repo=repo, revision=revision,
    )  # fmt: skip


def _in_blocks(tensor: OutputTensor, store: BlockStore) -> OutputTensor:
    """The tensor in the block format whose whole rows its sources hold, where they do."""
    kinds = {store.blocks.get(piece.source) for piece in tensor.pieces}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None or any(piece.source_columns() is None for piece in tensor.pieces):
        return tensor
    return replace(tensor, dtype=PackedType(kind))


_QUANTIZATION_KEYS = ("general.file_type", "general.quantization_version")


def _open_gguf(
    label: str, found: Resolved, ignored: Sequence[str] = (), template: str | None = None
) -> Model:
    from quantcli.sources.remote import open_found_gguf
    from quantcli.vocab.template import TEMPLATE_KEY

    store = open_found_gguf(found)
    keys = {
        key: value
        for key, value in store.metadata.items()
        if key not in _QUANTIZATION_KEYS and not key.startswith(("split.", "quantcli."))
    }
    if "general.architecture" not in keys:
        store.close()
        raise SourceError(f"{found.path} has no general.architecture, so it is not a model")
    try:
        left = _ignored_names(store.tensors, ignored)
    except PlanError:
        store.close()
        raise
    if template is not None:
        keys[TEMPLATE_KEY] = text(template)
    tensors = tuple(
        OutputTensor(info.name, info.shape, info.dtype, (Piece(info.name, row_count(info.shape)),))
        for info in store.tensors.values()
        if info.name not in left
    )
    arch = str(keys["general.architecture"].value)
    return Model(
        label, found.path, arch, keys, tensors, store, from_gguf=True,
        repo=found.repo, revision=found.revision,
    )  # fmt: skip


def decode_rows(tensor: OutputTensor, rows: NDArray[Any]) -> Floats:
    """Rows of ``tensor`` as float32, decoded where they are stored in blocks."""
    if rows.dtype == np.uint8 and tensor.dtype in FORMATS:
        return native.decode(get_format(tensor.dtype), rows)
    return native.to_float32(rows)
