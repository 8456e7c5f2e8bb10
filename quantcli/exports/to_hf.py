"""``--to hf``: a GGUF as a folder that transformers loads, in plain floats.

Names, permuted heads, shifted norms, stacked experts and transposed weights are undone by the
architecture's own table, and configuration, tokenizer, generation settings and chat template are
rebuilt from the key-values. Weights are decoded slab by slab into sharded safetensors; every offset
is known before. A computed tensor (scaled rotations) goes back into the configuration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quantcli import __version__
from quantcli.artifacts.atomic_folder import MANIFEST, AtomicFolder, refuse_folder
from quantcli.artifacts.folder_files import (
    CONFIG,
    INDEX,
    read_settings,
    shard_names,
    write_index,
)
from quantcli.artifacts.gguf_container import FileLayout
from quantcli.artifacts.safetensors_container import lay_out
from quantcli.checkpoint_view import CheckpointView
from quantcli.errors import SourceError, WeightError
from quantcli.exports.cards import make_card, plain, types_text
from quantcli.exports.floats import FloatChoice, cast, choose_floats
from quantcli.exports.gguf_checkpoint import find_config, view_checkpoint
from quantcli.exports.outcome import Exported
from quantcli.exports.settings import complete_config, generation_config
from quantcli.exports.targets import Prepared, Wish, stem
from quantcli.exports.threads import in_order
from quantcli.exports.verify import stored_keys
from quantcli.formats import native
from quantcli.layouts.base import Layout
from quantcli.layouts.hf import HF
from quantcli.model import Model, open_model
from quantcli.plan.budget import check_disk
from quantcli.report.card import render_card
from quantcli.report.units import size_text
from quantcli.sources.resolve import Resolved
from quantcli.types import Declared, Event, Note, Progress, row_count
from quantcli.vocab.rebuild import rebuild_tokenizer

SHARD_BYTES = 5 * 10**9
"""Largest file without ``--split-max-size``."""
_SLAB_BYTES = 4 << 20


@dataclass(frozen=True)
class Folder:
    """A decided folder: small files by name, and the layout of each file of weights."""

    model: Model
    view: CheckpointView
    floats: FloatChoice
    path: Path
    files: Mapping[str, bytes]
    shards: Mapping[str, tuple[Declared, ...]]
    layouts: Mapping[str, FileLayout]
    notes: tuple[Note, ...]
    force: bool

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        small = {name: len(body) for name, body in self.files.items()}
        return small | {name: layout.size for name, layout in self.layouts.items()}


def prepare(found: Resolved, label: str, wish: Wish, stack: ExitStack) -> Prepared:
    """Decide ``--to hf`` for a GGUF; what cannot be rebuilt is refused here."""
    if found.kind != "gguf":
        what = "an importance matrix" if found.kind == "imatrix" else "a checkpoint already"
        raise SourceError(
            f"{label} is {what}, and --to hf makes a checkpoint of a GGUF",
            hint=f"quantcli quantize {label} --to hf writes it in another precision",
        )
    model = stack.enter_context(open_model(label))
    path = wish.output or Path(f"{stem(found)}-hf")
    if wish.check:
        refuse_folder(path, force=wish.force)
    folder = plan_folder(model, path, wish)
    nbytes = sum(folder.sizes.values())
    if wish.check:
        check_disk(nbytes, path.parent)
    dtypes = " and ".join(dict.fromkeys(folder.floats.stored.values()))
    return Prepared(
        (path,), nbytes, f"{len(folder.view.tensors)} tensors in {dtypes}",
        lambda: write_folder(folder, wish.threads),
    )  # fmt: skip


def plan_folder(model: Model, path: Path, wish: Wish) -> Folder:
    """Every file of the folder with its size; reads headers and small tensors."""
    config = find_config(model, wish.config)
    view = view_checkpoint(model, config)
    floats = choose_floats(model, view, wish.dtype)
    shards = _shard(view, floats, wish.split_max_size or SHARD_BYTES)
    layouts = {name: lay_out({"format": "pt"}, group) for name, group in shards.items()}
    places = {tensor.name: name for name, group in shards.items() for tensor in group}
    total = sum(tensor.nbytes for group in shards.values() for tensor in group)
    facts = [("weights", _weights_text(floats, total)), ("from", types_text(model))]
    files, notes = folder_files(model, path, wish, layout=HF, dtype=floats.loaded, facts=facts)
    if floats.note:
        notes.append(Note(floats.note))
    if len(shards) > 1:
        files[INDEX] = write_index(places, total)
    settings = complete_config(config, model.metadata, floats.loaded, wish.config)
    files[CONFIG] = to_json(settings)
    return Folder(
        model, view, floats, path, dict(sorted(files.items())), shards, layouts, tuple(notes),
        wish.force,
    )  # fmt: skip


def folder_files(
    model: Model,
    path: Path,
    wish: Wish,
    *,
    layout: Layout,
    dtype: str,
    facts: Sequence[tuple[str, str]],
) -> tuple[dict[str, bytes], list[Note]]:
    """Every file of a folder but config.json and the weights, by name, and remarks.

    ``facts`` go into the model card, ``dtype`` and the layout's name into the manifest.
    """
    files, notes = _tokenizer(model, wish)
    files.setdefault("generation_config.json", to_json(generation_config(model.metadata)))
    usage = layout.usage(path.name)
    card = make_card(model, path.name, layout.library, facts, usage, wish.evaluation)
    files["README.md"] = render_card(card).encode()
    files[MANIFEST] = to_json(_manifest(model, layout.name, dtype))
    return files, [Note(note) for note in notes]


def write_folder(folder: Folder, threads: int) -> Iterator[Event]:
    """Write it, yielding notes and progress, at last `Exported`."""
    yield from folder.notes
    places = {
        tensor.name: (name, folder.layouts[name].offsets[tensor.name], tensor)
        for name, group in folder.shards.items()
        for tensor in group
    }
    total = sum(info.nbytes for info in folder.view.tensors.values())
    done = 0
    with AtomicFolder(folder.path, folder.sizes, force=folder.force) as files:
        for name, body in folder.files.items():
            files.write(name, 0, body)
        for name, layout in folder.layouts.items():
            files.write(name, 0, layout.header)
        slabs = [
            (tensor, start, stop)
            for _, _, tensor in places.values()
            for start, stop in _cut(tensor)
        ]

        def convert(tensor: Declared, start: int, stop: int) -> None:
            data = _convert(folder, tensor, start, stop)
            name, offset, _ = places[tensor.name]
            row_bytes = tensor.nbytes // max(1, row_count(tensor.shape))
            files.write(name, offset + start * row_bytes, data)

        tasks = (partial(convert, *slab) for slab in slabs)
        for slab, _ in zip(slabs, in_order(tasks, threads), strict=True):
            tensor, start, stop = slab
            share = folder.view.tensors[tensor.name].nbytes * (stop - start)
            done += share // max(1, row_count(tensor.shape))
            yield Progress(min(done, total), total, tensor.name)
        files.publish()
    yield Exported((folder.path,), sum(folder.sizes.values()))


def _convert(folder: Folder, tensor: Declared, start: int, stop: int) -> memoryview:
    rows = folder.view.read_rows(tensor.name, start, stop)
    try:
        return cast(rows, tensor.dtype).data
    except native.UnencodableError as refused:
        home = folder.view.holder(tensor.name).name
        raise WeightError(
            f"{folder.model.path}: {home}: the weight {refused.value!r}, row {start + refused.row} "
            f"and column {refused.column} of {tensor.name}, {refused.reason}",
            hint="--dtype bf16 or --dtype f32 holds it"
            if math.isfinite(refused.value)
            else f"the file is damaged; quantcli export {folder.model.path} --verify names all "
            "such tensors",
        ) from refused


def _cut(tensor: Declared) -> Iterator[tuple[int, int]]:
    rows = row_count(tensor.shape)
    step = max(1, _SLAB_BYTES // max(1, tensor.nbytes // max(1, rows)))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _shard(view: CheckpointView, floats: FloatChoice, most: int) -> dict[str, tuple[Declared, ...]]:
    groups: list[list[Declared]] = []
    filled = 0
    for name, info in view.tensors.items():
        tensor = Declared(name, floats.stored[name], info.shape)
        if not groups or filled + tensor.nbytes > most:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    names = shard_names(len(groups))
    return {name: tuple(group) for name, group in zip(names, groups, strict=True)}


def _tokenizer(model: Model, wish: Wish) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer's files: rebuilt, or those of the folder that was named."""
    if wish.tokenizer is not None:
        if not wish.tokenizer.is_dir():
            raise SourceError(f"{wish.tokenizer} is not a folder")
        files = read_settings(wish.tokenizer)
        if not any(name.startswith("tokenizer") for name in files):
            raise SourceError(f"{wish.tokenizer} has no tokenizer files")
        return files, []
    context = model.value("context_length")
    longest = context if isinstance(context, int) else None
    rebuilt = rebuild_tokenizer(model.metadata, str(model.path), context=longest)
    files = {name: to_json(value) for name, value in rebuilt.objects.items()}
    return files | {k: v.encode() for k, v in rebuilt.texts.items()}, list(rebuilt.notes)


def _weights_text(floats: FloatChoice, nbytes: int) -> str:
    return f"{size_text(nbytes)} in {' and '.join(dict.fromkeys(floats.stored.values()))}"


def _manifest(model: Model, to: str, dtype: str) -> dict[str, Any]:
    """What quantcli.json says of the folder; `AtomicFolder` replaces no folder without one."""
    keys = stored_keys(model)
    source = {key: plain(keys, f"quantcli.source.{key}") for key in ("repo", "revision", "digest")}
    return {
        "schema": "quantcli.manifest/1",
        "quantcli": __version__,
        "to": to,
        "exported_from": model.path.name,
        "dtype": dtype,
        "recipe": plain(keys, "quantcli.recipe"),
        "source": {key: value for key, value in source.items() if value is not None},
    }


def to_json(value: Mapping[str, Any]) -> bytes:
    """A JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
