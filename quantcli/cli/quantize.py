"""``quantcli quantize``: a checkpoint becomes a quantized GGUF or model folder in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantcli.cli.methods import Calibrating
from quantcli.cli.options import (
    Debug,
    Json,
    ModelArgument,
    Quiet,
    Threads,
    Verbose,
    open_output,
    option,
)
from quantcli.cli.recipe_options import takes_recipe
from quantcli.errors import UsageError
from quantcli.plan.recipe_field import METHOD, OUTPUT, TYPES


@takes_recipe
def quantize(
    context: typer.Context,
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
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
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
    out = open_output(context, quiet=quiet, verbose=verbose, debug=debug, json=json)
    from quantcli.plan.recipe import Recipe
    from quantcli.plan.recipe_defaults import resolve_recipe
    from quantcli.plan.recipe_file import dump_recipe, load_recipe
    from quantcli.run.recipe_options import check_methods

    base = load_recipe(recipe) if recipe else Recipe()
    resolved = resolve_recipe(base, quality=quality, **fields)
    told = Calibrating(calibrate or (), chunks, resume)
    if chunks is not None and resolved.method is None and not calibrate:
        raise UsageError("--chunks cuts a text to run", hint="add --calibrate TEXT")
    check_methods(resolved, resume=resume)
    if print_recipe:
        for line in dump_recipe(resolved).splitlines():
            out.line(line)
        return
    from quantcli.plan.size_text import parse_size

    limit = parse_size(max_memory) if max_memory else None
    if calibrate and resolved.imatrix:
        raise UsageError("--calibrate and --imatrix exclude each other", hint="give one of them")
    if calibrate and dry_run and not resolved.method:
        raise UsageError(
            "--dry-run does not run the model, as --calibrate would",
            hint="'quantcli calibrate' first, then --imatrix FILE --dry-run",
        )
    if resolved.to == "gguf":
        from quantcli.cli.gguf import make_gguf as make
    else:
        from quantcli.cli.folders import make_folder as make
    make(
        out, model, resolved, output, told,
        dry_run=dry_run, force=force, threads=threads, limit=limit,
    )  # fmt: skip
