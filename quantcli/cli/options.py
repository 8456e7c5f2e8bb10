"""Arguments and options that several commands share, so that a flag means one thing everywhere.

The switches below may stand before or after the command: the top level and every `command` take
them.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer

from quantcli.cli.output import Output
from quantcli.errors import UsageError

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint folder, a Hub repository (org/name, org/name@revision or hf://...), an "
        "object store's address (s3://...) or a .gguf file.",
        show_default=False,
    ),
]


def option(*names: str, help: str, metavar: str = "", panel: str | None = None, **more: Any) -> Any:
    """An option whose help says what the default is; of a switch, without typer's "<bool>"."""
    return typer.Option(
        *names, help=help, metavar=metavar, show_default=False, rich_help_panel=panel, **more
    )


ANYWHERE, MACHINE = "With any command", "The model, and what runs it"
"""Panels of every command's help, the first one last."""
Quiet = Annotated[
    bool,
    option(
        "--quiet",
        "-q",
        panel=ANYWHERE,
        help="Print the result alone: no progress, no remarks; warnings stay.",
    ),
]
Verbose = Annotated[bool, option("--verbose", "-v", panel=ANYWHERE, help="Print more detail.")]
Debug = Annotated[
    bool,
    option(
        "--debug",
        panel=ANYWHERE,
        help="Show the traceback of an error (or set QUANTCLI_DEBUG=1).",
    ),
]
Json = Annotated[
    bool,
    option(
        "--json", panel=ANYWHERE,
        help="Print one JSON object with exact numbers and a versioned 'schema'.",
    ),
]  # fmt: skip
Download = Annotated[
    bool,
    option(
        "--download",
        panel=MACHINE,
        help="Store a model of the Hub in its cache first, instead of reading its weights from "
        "there as they are needed. An interrupted download goes on where it stopped.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "-t",
        min=1,
        metavar="N",
        help="How many threads work; the result is the same for any number. "
        "Default: one for each processor that this process may use.",
        show_default=False,
        rich_help_panel=ANYWHERE,
    ),
]


Device = Annotated[
    str | None,
    option(
        "--device", metavar="auto|cpu|cuda[:N]|xpu|mps", panel=MACHINE,
        help="Where the model is run, and what a method computes. Default: auto, which is CUDA or "
        "XPU if there is one, else the CPU.",
    ),
]  # fmt: skip


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function that takes its `Output` first: the switches are added here.

    They are joined with those that stood before the command's name.
    """

    @wraps(function)
    def run(
        context: typer.Context, *, json: bool, quiet: bool, verbose: bool, debug: bool, **given: Any
    ) -> None:
        outer = context.find_root().obj
        output = outer if isinstance(outer, Output) else Output()
        output.quiet |= quiet
        output.verbose |= verbose
        output.debug |= debug
        output.json |= json
        if output.quiet and output.verbose:
            raise UsageError(
                "--quiet and --verbose exclude each other", hint="leave one of them out"
            )
        function(output, **given)

    own = list(inspect.signature(function, eval_str=True).parameters.values())
    switches = {"json": Json, "quiet": Quiet, "verbose": Verbose, "debug": Debug}
    replace_parameters(
        run,
        [
            own[0].replace(name="context", annotation=typer.Context),
            *own[1:],
            *(
                own[0].replace(name=name, annotation=kind, default=False)
                for name, kind in switches.items()
            ),
        ],
    )
    return run


def replace_parameters(function: Callable[..., None], parameters: list[Parameter]) -> None:
    """Have typer see these parameters of a function, annotations evaluated."""
    function.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {each.name: each.annotation for each in parameters}


def debug_wanted(output: Output) -> bool:
    """Whether tracebacks are to be shown."""
    return output.debug or os.environ.get("QUANTCLI_DEBUG", "") not in ("", "0")
