"""``--to gguf``: a checkpoint in plain floats, or a GGUF in other files or in plain floats.

A checkpoint goes through the quantizer's own pipeline with a float type, so names, permutations
and key-values are those of any other GGUF. A GGUF without ``--dtype`` is split or merged as it is;
with one, its weights are decoded, which quantizes nothing again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from quantcli.artifacts.atomic import refuse_existing
from quantcli.artifacts.gguf_file import GgufFile, prepare_gguf
from quantcli.artifacts.gguf_set import prepare_gguf_set
from quantcli.artifacts.write import ArtifactDone, write_artifact
from quantcli.errors import SourceError, UsageError
from quantcli.exports.cards import card_beside, write_card
from quantcli.exports.float4_blocks import NVFP4
from quantcli.exports.repack import is_packed, prepare_repacking
from quantcli.exports.targets import ExportOptions, Prepared, stem
from quantcli.model import Model, open_model
from quantcli.plan.recipe import Recipe
from quantcli.sources.remote import open_found_gguf
from quantcli.sources.resolve import Resolved
from quantcli.types import Event, PackedType

_PLAIN = {"F64": "F32", "F32": "F32", "F16": "F16"}
"""The float type that keeps all of a stored dtype; what is not here becomes BF16."""

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def prepare(found: Resolved, label: str, options: ExportOptions, stack: ExitStack) -> Prepared:
    """Decide an export to GGUF; raises what the pipeline and the regrouping raise."""
    if found.kind == "imatrix":
        raise SourceError(
            f"{label} is an importance matrix", hint="--to imatrix or --to dat converts it"
        )
    if found.kind == "gguf" and options.dtype is None:
        return _prepare_regrouping(found, label, options, stack)
    return _prepare_floats(found, label, options, stack)


def _prepare_regrouping(
    found: Resolved, label: str, options: ExportOptions, stack: ExitStack
) -> Prepared:
    store = open_found_gguf(found)
    stack.callback(store.close)
    if len(store.files) == 1 and options.split_max_size is None:
        raise UsageError(
            f"{label} is one GGUF file already",
            hint="--split-max-size 4G splits it, --dtype f16 decodes it, --to hf makes a folder",
        )
    output = options.output or Path(f"{stem(found)}.gguf")
    job = prepare_gguf_set(
        store, output, max_bytes=options.split_max_size, force=options.force, check=options.check
    )
    files = len(job.paths)
    how = "merged into one file" if files == 1 else f"split into {files} files"
    return _with_card(
        Prepared(
            job.paths,
            job.nbytes,
            f"{how}, the tensors as they are",
            lambda: write_artifact(job, threads=options.threads),
        ),
        options,
    )


def _prepare_floats(
    found: Resolved, label: str, options: ExportOptions, stack: ExitStack
) -> Prepared:
    model = stack.enter_context(open_model(label, gguf_only=True, found=found))
    if options.dtype is None and is_packed(model):
        return _prepare_codes(found, model, label, options)
    dtype = options.dtype or _plain_type(model)
    recipe = Recipe(
        type=dtype,
        # Decoding to floats loses nothing more, so it needs no permission.
        allow_requantize=any(tensor.dtype not in _FLOATS for tensor in model.tensors),
        split_max_size=None if options.split_max_size is None else str(options.split_max_size),
    )
    output = options.output or Path(f"{stem(found)}-{dtype}.gguf")
    job = prepare_gguf(model, recipe, output, force=options.force, check=options.check)
    why = "which keeps the stored precision"
    if options.dtype is not None:
        why = "as asked for"
    elif any(tensor.dtype.startswith("F8_") for tensor in model.tensors):
        why = "to which FP8 times its scales is rounded"
    return _of_job(job, f"matrices in {dtype}, {why}", options)


def _prepare_codes(found: Resolved, model: Model, label: str, options: ExportOptions) -> Prepared:
    """A quantized checkpoint with its codes in blocks."""
    job = prepare_repacking(
        model,
        label,
        _plain_type(model),
        options.output or Path(f"{stem(found)}.gguf"),
        split_max_size=options.split_max_size,
        requantize=options.requantize,
        force=options.force,
        check=options.check,
    )
    packed = [item for item in job.plan.items if isinstance(item.tensor.dtype, PackedType)]
    coded = [item for item in packed if item.tensor.name in job.encoders]
    kinds = sorted({item.format for item in coded})
    how = "the same codes and scales" if NVFP4 in kinds else "bit for bit"
    words = f"{len(coded)} matrices in {' and '.join(kinds)}, {how}"
    rounded = len(packed) - len(coded)
    if rounded:
        words += f", {rounded} rounded again"
    return _of_job(job, words, options)


def _of_job(job: GgufFile, sentence: str, options: ExportOptions) -> Prepared:
    return _with_card(
        Prepared(
            job.paths, job.nbytes, sentence, lambda: write_artifact(job, threads=options.threads)
        ),
        options,
    )


def _plain_type(model: Model) -> str:
    weights: Counter[str] = Counter()
    for tensor in model.tensors:
        if not isinstance(tensor.dtype, PackedType):
            weights[tensor.dtype] += tensor.elements
    (dtype, _), *_ = weights.most_common(1) or [("F32", 0)]
    return _PLAIN.get(dtype, "BF16")


def _with_card(prepared: Prepared, options: ExportOptions) -> Prepared:
    """The same with a model card beside the file, where one is wanted."""
    if not options.card:
        return prepared
    card = card_beside(prepared.paths[0])
    if options.check:
        refuse_existing([card], force=options.force)

    def run() -> Iterator[Event]:
        for event in prepared.run():
            if isinstance(event, ArtifactDone):
                size = write_card(prepared.paths[0], card, options)
                yield replace(event, paths=(*event.paths, card), nbytes=event.nbytes + size)
            else:
                yield event

    return Prepared((*prepared.paths, card), prepared.nbytes, prepared.sentence, run)
