"""``--to hf``: a GGUF as a folder that transformers loads, in plain floats.

Names, permuted heads, shifted norms, stacked experts and transposed weights are undone by the
architecture's own table, and configuration, tokenizer, generation settings and chat template are
rebuilt from the key-values. Weights are decoded slab by slab into sharded safetensors; every offset
is known before. A computed tensor (scaled rotations) goes back into the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from quantcli import __version__
from quantcli.artifacts.atomic_folder import MANIFEST, refuse_folder
from quantcli.artifacts.folder_files import CONFIG, index_files, read_settings, to_json
from quantcli.artifacts.model_card import render_card
from quantcli.artifacts.safetensors_shards import (
    LARGEST,
    FolderArtifact,
    SafetensorsShards,
    lay_out_shards,
)
from quantcli.artifacts.slabs import SLAB_BYTES, Slab, cut_slabs, refuse_weight
from quantcli.artifacts.write import ArtifactPart, Chunk, write_artifact
from quantcli.checkpoint_view import CheckpointView
from quantcli.errors import SourceError, WeightError
from quantcli.exports.cards import make_card, plain, types_text
from quantcli.exports.floats import FloatChoice, cast, choose_floats
from quantcli.exports.gguf_checkpoint import find_config, view_checkpoint
from quantcli.exports.settings import complete_config, generation_config
from quantcli.exports.targets import ExportOptions, Prepared, stem
from quantcli.exports.verify import stored_keys
from quantcli.formats import native
from quantcli.layouts.base import DTYPES, Layout
from quantcli.layouts.hf import HF
from quantcli.model import Model, open_model
from quantcli.plan.budget import check_disk
from quantcli.report.units import size_text
from quantcli.sources.card import CARD
from quantcli.sources.resolve import Resolved
from quantcli.types import Declared, Note, row_count
from quantcli.vocab.rebuild import rebuild_tokenizer


@dataclass(frozen=True)
class CheckpointFolder(FolderArtifact):
    """A decided folder: the files of weights, and the small ones by name."""

    model: Model
    view: CheckpointView
    floats: FloatChoice
    path: Path
    files: Mapping[str, bytes]
    weights: SafetensorsShards
    force: bool
    notes: Sequence[Note] = ()

    @property
    def label(self) -> str:
        """What the user calls the GGUF."""
        return self.model.label

    @property
    def source(self) -> object:
        """The GGUF as a checkpoint."""
        return self.view

    @property
    def thread_bytes(self) -> int:
        """Rows as stored, decoded and cast; a row at least, however long it is."""
        rows = [4 * info.shape[-1] for info in self.view.tensors.values() if info.shape]
        return 4 * max(SLAB_BYTES, *rows)

    def parts(self) -> Iterator[ArtifactPart]:
        """The slabs of each stored tensor."""
        for name, (_, _, declared) in self.weights.places.items():
            rows = row_count(declared.shape)
            nbytes = self.view.tensors[name].nbytes
            row_bytes = declared.nbytes // max(1, rows)
            for slab in cut_slabs(name, range(rows), nbytes, row_bytes=row_bytes):
                yield ArtifactPart(
                    slab,
                    partial(self.view.read_rows, name, slab.start, slab.stop),
                    partial(self._encode, slab),
                    partial(self._refuse, slab),
                )

    def _encode(self, slab: Slab, rows: NDArray[Any]) -> Iterator[Chunk]:
        dtype = self.floats.stored[slab.tensor]
        values = cast(rows, dtype).view(DTYPES[dtype])
        return self.weights.place(slab.tensor, values, slab.start)

    def _refuse(self, slab: Slab, refused: native.UnencodableError) -> WeightError:
        path, row = self.model.path, slab.start + refused.row
        return refuse_weight(
            refused,
            path,
            f"{self.view.holder(slab.tensor).name} ({slab.tensor})",
            row,
            refused.column,
            wider="--dtype bf16 or --dtype f32 holds it",
            damaged=f"the file is damaged; quantcli export {path} --verify names all such tensors",
        )


def prepare(found: Resolved, label: str, options: ExportOptions, stack: ExitStack) -> Prepared:
    """Decide ``--to hf`` for a GGUF; what cannot be rebuilt is refused here."""
    if found.kind == "checkpoint":
        from quantcli.exports.folder_to_folder import prepare_floats

        return prepare_floats(found, label, options, stack)
    if found.kind != "gguf":
        raise SourceError(f"{label} is an importance matrix, and --to hf makes a checkpoint")
    model = stack.enter_context(open_model(label, found=found))
    path = options.output or Path(f"{stem(found)}-hf")
    if options.check:
        refuse_folder(path, force=options.force)
    folder = plan_folder(model, path, options)
    if options.check:
        check_disk(folder.nbytes, path.parent)
    dtypes = " and ".join(dict.fromkeys(folder.floats.stored.values()))
    return Prepared(
        (path,), folder.nbytes, f"{len(folder.view.tensors)} tensors in {dtypes}",
        lambda: write_artifact(folder, threads=options.threads),
    )  # fmt: skip


def plan_folder(model: Model, path: Path, options: ExportOptions) -> CheckpointFolder:
    """Every file of the folder with its size; reads headers and small tensors."""
    config = find_config(model, options.config)
    view = view_checkpoint(model, config)
    floats = choose_floats(model, view, options.dtype)
    declared = [
        Declared(name, floats.stored[name], info.shape) for name, info in view.tensors.items()
    ]
    weights = lay_out_shards({"format": "pt"}, declared, options.split_max_size or LARGEST)
    facts = [
        ("weights", _weights_text(floats, weights.tensor_bytes)),
        ("from", types_text(model)),
    ]
    files, notes = folder_files(model, path, options, layout=HF, dtype=floats.loaded, facts=facts)
    if floats.note:
        notes.append(Note(floats.note))
    files |= index_files(weights)
    settings = complete_config(config, model.metadata, floats.loaded, options.config)
    files[CONFIG] = to_json(settings)
    return CheckpointFolder(
        model, view, floats, path, dict(sorted(files.items())), weights, options.force, notes
    )


def folder_files(
    model: Model,
    path: Path,
    options: ExportOptions,
    *,
    layout: Layout,
    dtype: str,
    facts: Sequence[tuple[str, str]],
) -> tuple[dict[str, bytes], list[Note]]:
    """Every file of a folder but config.json and the weights, by name, and remarks.

    ``facts`` go into the model card, ``dtype`` and the layout's name into the manifest.
    """
    files, notes = _tokenizer(model, options)
    files.setdefault("generation_config.json", to_json(generation_config(model.metadata)))
    usage = layout.usage(path.name)
    card = make_card(model, path.name, layout.library, facts, usage, options.evaluation)
    files[CARD] = render_card(card)
    files[MANIFEST] = to_json(_manifest(model, layout.name, dtype))
    return files, [Note(note) for note in notes]


def _tokenizer(model: Model, options: ExportOptions) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer's files: rebuilt, or those of the folder that was named."""
    if options.tokenizer is not None:
        if not options.tokenizer.is_dir():
            raise SourceError(f"{options.tokenizer} is not a folder")
        files = read_settings(options.tokenizer)
        if not any(name.startswith("tokenizer") for name in files):
            raise SourceError(f"{options.tokenizer} has no tokenizer files")
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
