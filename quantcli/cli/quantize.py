"""``quantcli quantize``: a checkpoint becomes a quantized GGUF in one streamed pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcli.cli.folder_options import (
    Activations,
    Dtype,
    GroupSize,
    Keep,
    Range,
    Symmetric,
    To,
    grid_fields,
)
from quantcli.cli.options import (
    Debug,
    Json,
    ModelArgument,
    Quiet,
    Threads,
    Verbose,
    flag,
    open_output,
)

if TYPE_CHECKING:
    from quantcli.cli.output import Output
    from quantcli.run.request import Request

_MIXTURE = "Which type each tensor gets"
_METHOD = "How weights are rounded"
_OUTPUT = "The file that is written"


def _option(*names: str, help: str, metavar: str = "", panel: str = _MIXTURE) -> Any:
    return typer.Option(
        *names, help=help, metavar=metavar, show_default=False, rich_help_panel=panel
    )


def quantize(
    context: typer.Context,
    model: ModelArgument,
    bits: Annotated[
        int | None,
        _option(
            "--bits",
            "-b",
            metavar="N",
            help="2, 3, 4, 5, 6, 8 or 16: short for the types Q2_K, Q3_K_M, Q4_K_M, Q5_K_M, Q6_K, "
            "Q8_0 and BF16. Default: 4.",
        ),
    ] = None,
    type_name: Annotated[
        str | None,
        _option("--type", metavar="NAME", help="The exact type, such as Q4_K_S or Q5_K_M."),
    ] = None,
    imatrix: Annotated[
        Path | None,
        _option(
            "--imatrix",
            metavar="FILE",
            help="Importance matrix (GGUF or .dat): which weights matter most.",
        ),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        _option(
            "--calibrate",
            metavar="TEXT",
            help="Run the checkpoint on this text file first. With --method it rounds each layer "
            "in turn; without one it makes the importance matrix and keeps it beside the output "
            "as NAME.calib.gguf. Repeatable. See 'quantcli calibrate' for more.",
        ),
    ] = None,
    quality: Annotated[
        str | None,
        _option(
            "--quality",
            metavar="fast|high",
            panel=_METHOD,
            help="high: what was measured to win, --method gptq --allocate for a GGUF. "
            "Default: fast, no method.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        _option(
            "--method",
            metavar="NAME",
            panel=_METHOD,
            help="Round by calibrated methods, one after the other with commas between: awq, "
            "smoothquant and rotate transform the weights first, gptq rounds with feedback, tune "
            "trains each layer's codes and scales afterwards.",
        ),
    ] = None,
    damping: Annotated[
        float | None,
        _option(
            "--damping",
            metavar="SHARE",
            panel=_METHOD,
            help="What is added to a Hessian's diagonal, as a share of its mean. Default: 0.05.",
        ),
    ] = None,
    column_order: Annotated[
        str | None,
        _option(
            "--column-order",
            metavar="natural|activation",
            panel=_METHOD,
            help="Round columns from left to right, or those with the largest inputs first.",
        ),
    ] = None,
    sweeps: Annotated[
        int | None,
        _option(
            "--sweeps",
            metavar="N",
            panel=_METHOD,
            help="Sweeps of coordinate descent on codes and scales afterwards. Default: 1.",
        ),
    ] = None,
    fisher_windows: Annotated[
        int | None,
        _option(
            "--fisher-windows",
            metavar="N",
            panel=_METHOD,
            help="Windows that also go backwards, to tell what outputs matter to predictions; "
            "0: all alike. Default: 40.",
        ),
    ] = None,
    random_share: Annotated[
        float | None,
        _option(
            "--random-share",
            metavar="SHARE",
            panel=_METHOD,
            help="Of the windows that are run, how many are of random tokens, so that text of "
            "another kind fares well too. Default: 0.3.",
        ),
    ] = None,
    propagate: Annotated[
        bool,
        flag(
            "--propagate",
            help="Fit each layer to the inputs that the quantized layers before it give.",
            panel=_METHOD,
        ),
    ] = False,
    tune_steps: Annotated[
        int | None,
        _option(
            "--tune-steps",
            metavar="N",
            panel=_METHOD,
            help="Steps of training for each layer, with --method tune. Default: 150.",
        ),
    ] = None,
    tune: Annotated[
        str | None,
        _option(
            "--tune",
            metavar="e2e",
            panel=_METHOD,
            help="After the method: train the whole model's block factors, norms and biases on "
            "the KL divergence from the original. No byte more, no code changed.",
        ),
    ] = None,
    e2e_steps: Annotated[
        int | None,
        _option(
            "--e2e-steps",
            metavar="N",
            panel=_METHOD,
            help="Steps of that training. Default: 120.",
        ),
    ] = None,
    allocate: Annotated[
        bool,
        flag(
            "--allocate",
            help="Choose each tensor's type by what it costs predictions, within the size that "
            "--type or --bits gives.",
            panel=_METHOD,
        ),
    ] = False,
    target_size: Annotated[
        str | None,
        _option(
            "--target-size",
            metavar="SIZE",
            panel=_METHOD,
            help="Like --allocate, for a file of at most SIZE, such as 4G or 500M.",
        ),
    ] = None,
    chunks: Annotated[
        int | None,
        _option(
            "--chunks",
            metavar="N",
            panel=_METHOD,
            help="Use at most N windows of 512 tokens of the text.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        flag("--resume", help="Continue an interrupted --method run.", panel=_METHOD),
    ] = False,
    include_weights: Annotated[
        list[str] | None,
        _option(
            "--include-weights",
            metavar="TEXT",
            help="Use the importance matrix only for tensors whose name contains TEXT. Repeatable.",
        ),
    ] = None,
    exclude_weights: Annotated[
        list[str] | None,
        _option(
            "--exclude-weights",
            metavar="TEXT",
            help="Do not use the importance matrix for tensors whose name contains TEXT. "
            "Repeatable.",
        ),
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        _option(
            "--tensor-type",
            metavar="REGEX=TYPE",
            help="Give tensors whose name matches a type of their own; the first match wins. "
            "Repeatable.",
        ),
    ] = None,
    output_tensor_type: Annotated[
        str | None,
        _option("--output-tensor-type", metavar="TYPE", help="Type of output.weight."),
    ] = None,
    token_embedding_type: Annotated[
        str | None,
        _option("--token-embedding-type", metavar="TYPE", help="Type of the token embeddings."),
    ] = None,
    leave_output_tensor: Annotated[
        bool, flag("--leave-output-tensor", help="Keep output.weight as it is.", panel=_MIXTURE)
    ] = False,
    pure: Annotated[
        bool, flag("--pure", help="The same type for every tensor, no mixture.", panel=_MIXTURE)
    ] = False,
    allow_requantize: Annotated[
        bool,
        flag(
            "--allow-requantize",
            help="Accept a source that is quantized already; this costs quality.",
            panel=_MIXTURE,
        ),
    ] = False,
    on_fallback: Annotated[
        str | None,
        _option(
            "--on-fallback",
            metavar="warn|error",
            help="What to do when a row's length does not fit a type's blocks: take the next "
            "larger type and say so, or stop.",
        ),
    ] = None,
    to: To = None,
    group_size: GroupSize = None,
    symmetric: Symmetric = None,
    activations: Activations = None,
    range: Range = None,
    keep: Keep = None,
    dtype: Dtype = None,
    recipe: Annotated[
        Path | None,
        _option(
            "--recipe",
            metavar="FILE",
            help="Read these options from a TOML or YAML file; options given here win.",
        ),
    ] = None,
    print_recipe: Annotated[
        bool,
        flag(
            "--print-recipe",
            help="Print the options as a recipe file and stop.",
            panel=_MIXTURE,
        ),
    ] = False,
    output: Annotated[
        Path | None,
        _option(
            "--output",
            "-o",
            metavar="PATH",
            panel=_OUTPUT,
            help="Default: MODEL-TYPE.gguf, or MODEL-FORMAT-BITS, in this folder.",
        ),
    ] = None,
    force: Annotated[
        bool, flag("--force", "-f", help="Replace what exists.", panel=_OUTPUT)
    ] = False,
    split_max_size: Annotated[
        str | None,
        _option(
            "--split-max-size",
            "--max-shard-size",
            metavar="SIZE",
            panel=_OUTPUT,
            help="Split into files of at most SIZE, such as 4G or 500M. Model folders: 5G.",
        ),
    ] = None,
    override_kv: Annotated[
        list[str] | None,
        _option(
            "--override-kv",
            metavar="KEY=TYPE:VALUE",
            panel=_OUTPUT,
            help="Set a key-value; TYPE is int, float, bool or str. Repeatable.",
        ),
    ] = None,
    pre: Annotated[
        str | None,
        _option(
            "--pre",
            metavar="NAME",
            panel=_OUTPUT,
            help="Name the pre-tokenizer, where it is not recognised.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        flag("--dry-run", help="Print the exact plan and write nothing.", panel=_OUTPUT),
    ] = False,
    threads: Threads = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory",
            metavar="SIZE",
            show_default=False,
            help="Keep resident memory below SIZE, such as 300M, by working on fewer threads. "
            "Without it, a few slabs of 4 MB for each thread are in memory.",
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Quantize MODEL to a GGUF file that llama.cpp runs, or to a model folder.

    The weights are read, quantized and written piece by piece, so the model
    need not fit into memory. Prints the path of the file or folder.

    4 bits, the usual choice:   quantcli quantize ./my-model --bits 4

    See the plan first:         quantcli quantize ./my-model --bits 4 --dry-run

    For vLLM or transformers:   quantcli quantize ./my-model --to compressed-tensors

    In a script:                f=$(quantcli quantize ./my-model --bits 4 -q)
    """
    out = open_output(context, quiet=quiet, verbose=verbose, debug=debug, json=json)
    from quantcli.plan.budget import parse_size
    from quantcli.plan.recipe import Recipe, dump_recipe, load_recipe
    from quantcli.run.request import Request, Wanted, check_request, make_recipe

    resolved = make_recipe(
        load_recipe(recipe) if recipe else Recipe(),
        bits=bits,
        quality=quality,
        type=type_name,
        tensor_types=tensor_type,
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        leave_output_tensor=leave_output_tensor or None,
        pure=pure or None,
        imatrix=str(imatrix) if imatrix else None,
        include_weights=include_weights,
        exclude_weights=exclude_weights,
        allow_requantize=allow_requantize or None,
        override_kv=override_kv,
        on_fallback=on_fallback,
        split_max_size=split_max_size,
        pre=pre,
        method=method,
        damping=damping,
        column_order=column_order,
        sweeps=sweeps,
        fisher_windows=fisher_windows,
        random_share=random_share,
        propagate=propagate or None,
        tune_steps=tune_steps,
        allocate=allocate or None,
        target_size=target_size,
        tune=tune,
        e2e_steps=e2e_steps,
        **grid_fields(to, group_size, symmetric, activations, range, keep, dtype),
    )
    request = Request(
        model,
        [Wanted(resolved, output)],
        calibrate or (),
        chunks=chunks,
        resume=resume,
        force=force,
        dry_run=dry_run,
        threads=threads,
        max_memory=parse_size(max_memory) if max_memory else None,
    )
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
                for path in done.paths:
                    out.result(path)
