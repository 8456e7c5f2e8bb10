"""``quantcli.quantize``: a quantization from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Unpack, get_origin

from quantcli.api.calls import (
    Names,
    Watch,
    as_names,
    parse_bytes,
    refuse_below_one,
    takes_keywords,
)
from quantcli.api.fit import choose_type, read_fit
from quantcli.api.recipe_options import RecipeOptions
from quantcli.api.report import files_to_push, plan_outputs_report
from quantcli.api.to_store import into_store
from quantcli.events import Show, drain
from quantcli.exports.to_hub import check_push, upload_artifacts
from quantcli.plan.output_set import Output, expand_outputs
from quantcli.plan.recipe import FIELDS, Recipe
from quantcli.plan.recipe_file import read_bases
from quantcli.ranks.share import read_share
from quantcli.report.quantized import output_document, shard_document, whole_document
from quantcli.run import quantize as quantizing
from quantcli.run.outputs import Quantized
from quantcli.run.request import Request, place_outputs, refuse_with_stream
from quantcli.types import Event, Note


@dataclass(frozen=True)
class OutputResult:
    """One output: its files, their size, bits per weight over all tensors, and its document."""

    paths: tuple[Path, ...]
    nbytes: int
    bits_per_weight: float
    document: Mapping[str, Any]


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize` made, or with ``dry_run`` would make.

    ``nbytes`` is the exact size of all files together, but for ``mmproj``. ``document`` holds the
    facts that ``quantcli quantize --json`` prints: with ``dry_run`` what each tensor would become
    and why, else, under "tensors", what became of each one that a method rounded.
    ``source_digest`` is None for a dry run. Of several outputs, ``paths`` and ``nbytes`` are of
    all, ``bits_per_weight`` is their mean, and ``outputs`` has each one's own.
    """

    paths: tuple[Path, ...]
    nbytes: int
    bits_per_weight: float
    source_digest: str | None
    document: Mapping[str, Any]
    notes: tuple[Note, ...]
    mmproj: Path | None = None
    """The file of the vision or audio tower, if one was asked for beside the text model."""
    outputs: tuple[OutputResult, ...] = ()
    url: str | None = None
    """Where ``push`` put them."""
    report: tuple[Path, ...] = ()
    """The page and the card that ``report`` asked for."""


@takes_keywords
@into_store
def quantize(
    source: str | Path,
    output: str | Path | None = None,
    *,
    output_set: Literal["popular", "small", "all"] | None = None,
    quality: Literal["fast", "good", "high", "max"] | None = None,
    fit: str | None = None,
    on: str | None = None,
    ctx: int | str | None = None,
    kv_type: str | None = None,
    mmproj: bool = False,
    mmproj_type: str | None = None,
    calibrate: Names = (),
    chunks: int | None = None,
    recipe: str | Path | Recipe | Sequence[Recipe] | None = None,
    resume: bool = False,
    force: bool = False,
    download: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    max_memory: int | str | None = None,
    scratch: str | Path | None = None,
    max_scratch: int | str | None = None,
    shard: str | None = None,
    device: str | None = None,
    push: str | None = None,
    public: bool = False,
    report: str | Path | None = None,
    on_event: Show | None = None,
    **options: Unpack[RecipeOptions],
) -> QuantizeResult:
    """Quantize a model to a GGUF, or with ``to`` to a model folder.

    ``options`` win over those of ``recipe``, a file or a `Recipe` or several. ``output`` defaults
    to a name made of the model's and the recipe's, in the current folder. Several types, bits or
    layouts
    (``type=["Q4_K_M", "Q8_0"]``), an ``output_set`` by name or a recipe of several outputs make
    one file each from one read of the model, in the folder ``output``. ``mmproj`` writes the vision
    or audio tower as well, next to it, as F16 or ``mmproj_type``. The texts ``calibrate`` are
    what a ``method`` runs the model on (the built-in mix, if there are none), ``chunks`` windows
    of them at most; without a method they make an importance matrix, which is kept next to the
    output.
    ``fit`` chooses the type for a machine, as `inspect` does with ``on``, ``ctx`` and ``kv_type``.
    A model of the Hub is read where it is, or with ``download`` stored in the Hub's cache first.
    ``resume`` continues an interrupted run or set, ``dry_run`` plans and writes nothing.
    ``max_memory`` limits resident memory, in bytes or as "300M", and ``max_scratch`` the run's own
    files, which lie in the folder ``scratch`` or beside the output. ``device``
    is where the model is run and methods round: auto (the default), cpu, cuda, cuda:1, xpu or mps.
    ``shard`` is the part of the work that this process does, such as "2/4", "merge" for the last
    step alone or "env" for what RANK and WORLD_SIZE say; until all parts are done, the result has
    no outputs. ``push`` uploads what was made to that repository, private unless ``public``.
    ``report`` is a folder for a page and a card about what was made.
    """
    refuse_below_one(threads=threads)
    refuse_with_stream(output, push=push, report=report, resume=resume)
    check_push(push, public=public, dry_run=dry_run)
    share = read_share(shard)
    watch = Watch(on_event)
    fields = {name: _as_field(name, value) for name, value in options.items()}
    wish = read_fit(fit, on=on, ctx=ctx, kv_type=kv_type)
    if wish is not None:
        taken = fields | {"set": output_set}
        fields["type"] = (choose_type(str(source), wish, taken, watch),)
    texts = as_names(calibrate)
    asked = expand_outputs(
        _read_recipe(recipe),
        output_set=output_set,
        quality=quality,
        has_texts=bool(texts),
        **fields,
    )
    request = Request(
        str(source),
        place_outputs(asked, output, mmproj=mmproj, mmproj_type=mmproj_type),
        texts,
        chunks=chunks,
        resume=resume,
        force=force,
        dry_run=dry_run,
        threads=threads,
        max_memory=parse_bytes(max_memory),
        scratch=None if scratch is None else Path(scratch),
        max_scratch=parse_bytes(max_scratch),
        left_out=asked.left_out,
        remark=asked.remark,
        share=share,
        download=download,
        device=device,
    )
    speaks = share is None or share.speaks
    page = None
    if report and speaks:
        page = plan_outputs_report(report, request, check=not dry_run)

    def show(event: Event) -> None:
        watch(event)
        if page is not None:
            page(event)

    finished = drain(quantizing.quantize(request, on_fetch=watch), show)
    if share is not None and not finished:
        return QuantizeResult((), 0, 0.0, None, shard_document(share), tuple(watch.notes))
    main = [done for done in finished if not done.is_tower] or finished
    tower = next((done for done in finished if done.is_tower and done not in main), None)
    pages: tuple[Path, ...] = ()
    if page is not None and not dry_run:
        pages = page.of_outputs(finished, request.source, watch)
    sent = None
    if push and speaks and not dry_run:
        made = files_to_push(finished, pages)
        sent = drain(upload_artifacts(made, push, public=public), watch)
    document = whole_document(finished, planned=dry_run)
    document |= {"report": list(map(str, pages))} if pages else {}
    return QuantizeResult(
        tuple(path for done in main for path in done.artifact.paths),
        sum(done.artifact.nbytes for done in main),
        fmean(done.artifact.bits_per_weight for done in main),
        main[0].digest,
        document,
        tuple(watch.notes),
        tower.artifact.paths[0] if tower else None,
        tuple(_result(done, planned=dry_run) for done in main),
        sent,
        pages,
    )


def _result(done: Quantized, *, planned: bool) -> OutputResult:
    document = output_document(done, planned=planned)
    artifact = done.artifact
    return OutputResult(artifact.paths, artifact.nbytes, artifact.bits_per_weight, document)


def _read_recipe(recipe: str | Path | Recipe | Sequence[Recipe] | None) -> Sequence[Output]:
    if recipe is None or isinstance(recipe, str | Path):
        return read_bases(recipe)
    return [Output(each) for each in ([recipe] if isinstance(recipe, Recipe) else recipe)]


def _as_field(name: str, value: Any) -> Any:
    """What the recipe takes: paths as text, and lists where one entry is given."""
    if isinstance(value, Path):
        value = str(value)
    is_list = get_origin(FIELDS[name].kind) is tuple
    return (value,) if is_list and isinstance(value, str) else value
