"""``quantcli quantize``: a checkpoint becomes a quantized GGUF or model folder in one pass."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcli.cli.habits import read_args, read_words
from quantcli.cli.options import (
    MACHINE,
    Device,
    Download,
    ModelArgument,
    Threads,
    command,
    option,
)
from quantcli.cli.output import Output
from quantcli.cli.recipe_options import takes_recipe
from quantcli.errors import UsageError
from quantcli.plan.recipe_field import BITS, METHOD, OUTPUT, TYPES

if TYPE_CHECKING:
    from quantcli.api.report import Report
    from quantcli.exports.to_store import StoreOutput
    from quantcli.run.outputs import Quantized
    from quantcli.run.request import Request
    from quantcli.types import Event


@command
@takes_recipe
def quantize(
    out: Output,
    model: ModelArgument,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OUTPUT] [TYPE]...", show_default=False,
            help="As llama-quantize takes them: a file, or a folder with a slash behind it (-o), "
            "and types (--type).",
        ),
    ] = None,
    fit: Annotated[
        str | None,
        option(
            "--fit", metavar="SIZE", panel=BITS.title,
            help="Choose the type for a machine with this much memory, such as 24G; 'quantcli "
            "inspect MODEL --fit SIZE' shows what each one needs.",
        ),
    ] = None,
    on: Annotated[
        str | None,
        option(
            "--on", metavar="gpu|mac|cpu", panel=BITS.title,
            help="With --fit: whose memory that is. Default: gpu.",
        ),
    ] = None,
    ctx: Annotated[
        str | None,
        option(
            "--ctx", metavar="N", panel=BITS.title,
            help="With --fit: tokens of context, such as 32k. Default: 8k.",
        ),
    ] = None,
    kv_type: Annotated[
        str | None,
        option(
            "--kv-type", metavar="TYPE", panel=BITS.title,
            help="With --fit: the type of the cache of keys and values. Default: f16.",
        ),
    ] = None,
    quality: Annotated[
        str | None,
        option(
            "--quality", metavar="fast|good|high|max", panel=METHOD.title,
            help="How much to do for the same size. fast: no method (the default); good: types "
            "chosen by cost, --method nearest --allocate; high: with error feedback, --method gptq "
            "--allocate; max: trained besides, --tune e2e, also on what the model writes.",
        ),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        option(
            "--calibrate", metavar="TEXT", panel=METHOD.title,
            help="Run the checkpoint on this text file first. A --method calibrates on it, layer "
            "by layer; without one it makes the importance matrix and keeps it next to the output "
            "as NAME.calib.gguf. Repeatable, also as TEXT:WEIGHT; 'default' is a built-in mix. See "
            "'quantcli calibrate' for more.",
        ),
    ] = None,
    chunks: Annotated[
        int | None,
        option(
            "--chunks", metavar="N", panel=METHOD.title,
            help="Use at most N windows of 512 tokens of the text.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        option(
            "--resume", panel=OUTPUT.title,
            help="Continue an interrupted --method run, or a set of several outputs: those that "
            "are whole stay, the others go on where they were.",
        ),
    ] = False,
    recipe: Annotated[
        Path | None,
        option(
            "--recipe", metavar="FILE", panel=TYPES.title,
            help="Read these options from a TOML or YAML file, from what quantcli made (a GGUF or "
            "a folder), or from a recipe that comes with it, such as q4_k_m-head8; options given "
            "here win.",
        ),
    ] = None,
    print_recipe: Annotated[
        bool,
        option(
            "--print-recipe", panel=TYPES.title, help="Print the options as a recipe file and stop."
        ),
    ] = False,
    output_set: Annotated[
        str | None,
        option(
            "--set", metavar="popular|small|all", panel=TYPES.title,
            help="Many types from one read of the model: what most publishers offer, those below "
            "four and a half bits, or all. --type adds to them.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        option(
            "--output", "-o", metavar="PATH", panel=OUTPUT.title,
            help="The file or folder to make; with a slash behind it, and for several outputs, the "
            "folder to put them in; - writes a GGUF to standard output, and s3://... (gs, az) "
            "uploads what was made. Default: MODEL-TYPE.gguf, or MODEL-FORMAT-BITS, in this "
            "folder.",
        ),
    ] = None,
    mmproj: Annotated[
        bool,
        option(
            "--mmproj", panel=OUTPUT.title,
            help="Write the vision or audio tower as well, for llama.cpp's --mmproj, next to the "
            "text model as mmproj-MODEL-F16.gguf. See --mmproj-only for the tower alone.",
        ),
    ] = False,
    mmproj_type: Annotated[
        str | None,
        option(
            "--mmproj-type", metavar="TYPE", panel=OUTPUT.title,
            help="Type of that file, such as Q8_0; implies --mmproj. Default: F16.",
        ),
    ] = None,
    force: Annotated[
        bool, option("--force", "-f", help="Replace what exists.", panel=OUTPUT.title)
    ] = False,
    prompt: Annotated[
        str | None,
        option(
            "--run", metavar="PROMPT", panel=OUTPUT.title,
            help="Show at once what the new GGUF answers to this, in llama.cpp (pip install "
            "llama-cpp-python). The answer goes to standard error.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        option("--dry-run", help="Print the exact plan and write nothing.", panel=OUTPUT.title),
    ] = False,
    download: Download = False,
    threads: Threads = None,
    max_memory: Annotated[
        str | None,
        option(
            "--max-memory", metavar="SIZE", panel=MACHINE,
            help="Keep resident memory below SIZE, such as 300M: fewer threads, and with a method "
            "hidden states in a file. What cannot be kept is refused before the work. Without it, "
            "a few slabs of 4 MB for each thread are in memory; --dry-run tells what a method "
            "takes.",
        ),
    ] = None,
    scratch: Annotated[
        Path | None,
        option(
            "--scratch", metavar="DIR", panel=MACHINE,
            help="Keep the files of a --method's run in this folder until the output is whole. "
            "Default: beside the output. --resume finds them with the same DIR.",
        ),
    ] = None,
    max_scratch: Annotated[
        str | None,
        option(
            "--max-scratch", metavar="SIZE", panel=MACHINE,
            help="Refuse a --method's run before the work if these files would take more than "
            "SIZE, such as 40G.",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        option(
            "--shard", metavar="I/N|merge", panel=OUTPUT.title,
            help="Write part I of N, as one of N such commands on machines that share the output's "
            "folder; whoever is last checks all parts and gives the output its name, which 'merge' "
            "does alone. Default: RANK and WORLD_SIZE, if torchrun or the like has set them.",
        ),
    ] = None,
    device: Device = None,
    push: Annotated[
        str | None,
        option(
            "--push", metavar="ORG/NAME", panel=OUTPUT.title,
            help="Upload what was made to this repository of the Hugging Face Hub, which is "
            "created, private, if it is not there. The token is that of 'hf auth login', or "
            "HF_TOKEN.",
        ),
    ] = None,
    public: Annotated[
        bool,
        option(
            "--public", panel=OUTPUT.title,
            help="With --push: create the repository for everyone to see.",
        ),
    ] = False,
    report: Annotated[
        Path | None,
        option(
            "--report", metavar="FOLDER", panel=OUTPUT.title,
            help="Write a page about what was made into this folder (report.html), and a card for "
            "its repository (README.md): sizes, each tensor's type and error, and what types "
            "cost where that was measured.",
        ),
    ] = None,
    **fields: Any,
) -> None:  # fmt: skip
    """Quantize MODEL to a GGUF file that llama.cpp runs, or to a model folder.

    The weights are read, quantized and written piece by piece, so the model
    need not fit into memory. Prints the path of the file or folder.

    4 bits, the usual choice:   quantcli quantize ./my-model --bits 4

    And what it answers:        quantcli quantize ./model --bits 4 --run "Hello!"

    See the plan first:         quantcli quantize ./my-model --bits 4 --dry-run

    Many types in one go:       quantcli quantize ./my-model --type Q2_K,Q4_K_M

    For vLLM or transformers:   quantcli quantize ./model --to compressed-tensors

    In a script:                f=$(quantcli quantize ./my-model --bits 4 -q)
    """
    from quantcli.api.fit import choose_type, read_fit
    from quantcli.api.report import plan_outputs_report
    from quantcli.exports.to_hub import check_push
    from quantcli.exports.to_store import stage_output
    from quantcli.plan.output_set import expand_outputs
    from quantcli.plan.recipe_file import dump_outputs, read_bases
    from quantcli.plan.size_text import parse_size
    from quantcli.ranks.share import ENVIRONMENT, read_share
    from quantcli.run.request import (
        Request,
        check_request,
        place_outputs,
        refuse_with_stream,
    )

    found = read_words(model, words or ())
    if found.output is not None and output is not None:
        raise UsageError(f"both {found.output} and -o {output} name the output", hint="name one")
    output, threads = output or found.output, threads or found.threads
    if found.types:
        fields["type"] = [*found.types, *(fields["type"] or ())]
    stdout_too = {} if dry_run else {"json": out.json, "run": prompt}
    refuse_with_stream(output, push=push, report=report, resume=resume, **stdout_too)
    check_push(push, public=public, dry_run=dry_run)
    share = read_share(shard or ENVIRONMENT)
    if share is not None and not share.speaks:
        out.leave_talk_to_others()
        report = None
    wish = read_fit(fit, on=on, ctx=ctx, kv_type=kv_type)
    if wish is not None:
        taken = fields | {"set": output_set}
        fields["type"] = [choose_type(model, wish, taken, out.event)]
    asked = expand_outputs(
        read_bases(recipe), output_set=output_set, quality=quality, has_texts=bool(calibrate),
        **fields,
    )  # fmt: skip
    store = stage_output(
        output, force=force, dry_run=dry_run or print_recipe, scratch=scratch, resume=resume,
        shard=share, push=push,
    )  # fmt: skip
    with store or nullcontext():
        request = Request(
            model,
            place_outputs(
                asked, store.place if store else output, mmproj=mmproj, mmproj_type=mmproj_type
            ),
            calibrate or (),
            chunks=chunks, resume=resume, force=force, dry_run=dry_run, threads=threads,
            download=download,
            max_memory=parse_size(max_memory) if max_memory else None, scratch=scratch,
            max_scratch=parse_size(max_scratch) if max_scratch else None, left_out=asked.left_out,
            share=share, remark=asked.remark,
            device=device,
        )  # fmt: skip
        if print_recipe:
            check_request(request)
            for line in dump_outputs(asked.outputs).splitlines():
                out.line(line)
            return
        if prompt is not None:
            if share is not None:
                raise UsageError("--run waits for no other shards", hint="leave --run out")
            if out.quiet:
                raise UsageError("--quiet shows no answer", hint="leave --quiet or --run out")
            from quantcli.api.answer import check_answer

            check_answer(request)
        page = plan_outputs_report(report, request, check=not dry_run) if report else None
        finished = _run(out, request, page, push, store, public=public)
        if prompt is not None:
            _answer(out, finished[0].artifact.paths[0], prompt, threads)
        elif (
            finished
            and not (push or store or request.dry_run or output == "-")
            and out.talks_to_a_terminal
        ):
            from quantcli.report.next_step import next_step

            out.say_command(next_step(finished))


def _answer(out: Output, path: Path, prompt: str, threads: int | None) -> None:
    from quantcli.api.answer import answer

    out.say("")
    for piece in answer(path, prompt, threads=threads):
        out.stream(piece)
    out.stream("\n")


def _run(
    out: Output, request: Request, report: Report | None, push: str | None,
    store: StoreOutput | None, *, public: bool,
) -> list[Quantized]:  # fmt: skip
    from quantcli.api.report import files_to_push
    from quantcli.artifacts.stream import STREAM
    from quantcli.events import drain
    from quantcli.exports.to_hub import upload_artifacts
    from quantcli.report import output_sets, quantized
    from quantcli.run.outputs import OutputDone
    from quantcli.run.quantize import quantize as run

    began = time.monotonic()

    def show(event: Event) -> None:
        out.event(event)
        if report is not None:
            report(event)
        if isinstance(event, OutputDone):
            # As soon as it is whole: what reads the pipe may go on with it.
            if request.is_set:
                out.say(output_sets.line_of(event.output))
            else:
                out.say(quantized.quantized_sentence(event.output))
            for path in event.output.artifact.paths if not out.json else ():
                if path != STREAM and store is None:
                    out.result(path)

    finished = drain(run(request, on_fetch=out.event), show)
    share = request.share
    if share is not None and not finished:
        # Whoever is last tells of the output.
        if out.json:
            out.document("shard", 1, quantized.shard_document(share))
        return finished
    pages: tuple[Path, ...] = ()
    if report is not None and not request.dry_run:
        pages = report.of_outputs(finished, request.source, out.event)
        out.say(f"the report is {pages[0]}")
    if store is not None and not request.dry_run:
        for url in drain(store.publish(), out.event):
            out.result(url)
    if out.json:
        document = quantized.whole_document(finished, planned=request.dry_run)
        document |= {"report": list(map(str, pages))} if pages else {}
        if store is not None:
            document = store.label(document)
        out.document("plan" if request.dry_run else "quantize", 1, document)
    elif request.dry_run and request.is_set:
        for table in output_sets.set_tables(finished):
            out.table(table if store is None else store.label(table))
    elif request.dry_run:
        for done in finished:
            for table in quantized.planned_tables(done):
                out.table(table if store is None else store.label(table))
    if request.is_set and not request.dry_run:
        out.say(output_sets.set_sentence(finished, time.monotonic() - began))
    if push and (share is None or share.speaks) and not request.dry_run:
        made = files_to_push(finished, pages)
        out.say(f"uploaded to {drain(upload_artifacts(made, push, public=public), out.event)}")
    return finished


quantize.read_args = read_args  # type: ignore[attr-defined]
