"""``quantcli quantize``: a checkpoint becomes a quantized GGUF or model folder in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from quantcli.cli.options import (
    ModelArgument,
    Threads,
    command,
    option,
)
from quantcli.cli.output import Output
from quantcli.cli.recipe_options import takes_recipe
from quantcli.plan.recipe_field import METHOD, OUTPUT, TYPES

if TYPE_CHECKING:
    from quantcli.run.request import Request


@command
@takes_recipe
def quantize(
    out: Output,
    model: ModelArgument,
    quality: Annotated[
        str | None,
        option(
            "--quality", metavar="fast|high", panel=METHOD.title,
            help="high: the methods that measured best, --method gptq --allocate for a GGUF. "
            "Default: fast, no method.",
        ),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        option(
            "--calibrate", metavar="TEXT", panel=METHOD.title,
            help="Run the checkpoint on this text file first. A --method calibrates on it, layer "
            "by layer; without one it makes the importance matrix and keeps it next to the output "
            "as NAME.calib.gguf. Repeatable. See 'quantcli calibrate' for more.",
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
        option("--resume", help="Continue an interrupted --method run.", panel=METHOD.title),
    ] = False,
    recipe: Annotated[
        Path | None,
        option(
            "--recipe", metavar="FILE", panel=TYPES.title,
            help="Read these options from a TOML or YAML file; options given here win.",
        ),
    ] = None,
    print_recipe: Annotated[
        bool,
        option(
            "--print-recipe", panel=TYPES.title, help="Print the options as a recipe file and stop."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        option(
            "--output", "-o", metavar="PATH", panel=OUTPUT.title,
            help="Default: MODEL-TYPE.gguf, or MODEL-FORMAT-BITS, in this folder.",
        ),
    ] = None,
    force: Annotated[
        bool, option("--force", "-f", help="Replace what exists.", panel=OUTPUT.title)
    ] = False,
    dry_run: Annotated[
        bool,
        option("--dry-run", help="Print the exact plan and write nothing.", panel=OUTPUT.title),
    ] = False,
    threads: Threads = None,
    max_memory: Annotated[
        str | None,
        option(
            "--max-memory", metavar="SIZE",
            help="Keep resident memory below SIZE, such as 300M, by working on fewer threads. "
            "Without it, a few slabs of 4 MB for each thread are in memory.",
        ),
    ] = None,
    **fields: Any,
) -> None:  # fmt: skip
    """Quantize MODEL to a GGUF file that llama.cpp runs, or to a model folder.

    The weights are read, quantized and written piece by piece, so the model
    need not fit into memory. Prints the path of the file or folder.

    4 bits, the usual choice:   quantcli quantize ./my-model --bits 4

    See the plan first:         quantcli quantize ./my-model --bits 4 --dry-run

    For vLLM or transformers:   quantcli quantize ./my-model --to compressed-tensors

    In a script:                f=$(quantcli quantize ./my-model --bits 4 -q)
    """
    from quantcli.plan.recipe import Recipe
    from quantcli.plan.recipe_defaults import resolve_recipe
    from quantcli.plan.recipe_file import dump_recipe, load_recipe
    from quantcli.plan.size_text import parse_size
    from quantcli.run.request import Request, Wanted, check_request

    base = load_recipe(recipe) if recipe else Recipe()
    resolved = resolve_recipe(base, quality=quality, **fields)
    request = Request(
        model, [Wanted(resolved, output, fields.get("bits"))], calibrate or (),
        chunks=chunks, resume=resume, force=force, dry_run=dry_run, threads=threads,
        max_memory=parse_size(max_memory) if max_memory else None,
    )  # fmt: skip
    if print_recipe:
        check_request(request)
        for line in dump_recipe(resolved).splitlines():
            out.line(line)
        return
    _run(out, request)


def _run(out: Output, request: Request) -> None:
    from quantcli.events import drain
    from quantcli.report import quantized as report
    from quantcli.run.quantize import quantize as run

    for done in drain(run(request, on_fetch=out.event), out.event):
        if request.dry_run and out.json:
            out.document("plan", 1, report.planned_document(done))
        elif request.dry_run:
            for table in report.planned_tables(done):
                out.table(table)
        else:
            out.say(report.quantized_sentence(done))
            if out.json:
                out.document("quantize", 1, report.quantized_document(done))
            else:
                for path in done.artifact.paths:
                    out.result(path)
