"""``quantcli``: the commands, the switches common to all, and one place where errors end.

Commands are read when they are called for; none may import NumPy or anything slower at its top,
so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import platform
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

import quantcli
from quantcli.cli import sign_of_life, stopping, streams
from quantcli.cli.failures import INTERRUPTED, Failure, explain
from quantcli.cli.help_tiers import ALL, essentials
from quantcli.cli.options import ANYWHERE, Debug, Json, Quiet, Verbose, debug_wanted, option
from quantcli.cli.output import Output
from quantcli.errors import UsageError
from quantcli.interrupts import leave, left_behind

COMMANDS = ("quantize", "export", "calibrate", "eval-ppl", "inspect")
"""A command NAME is the function NAME of the module ``quantcli.cli.NAME``, with - read as _."""

_JSON = "quantcli.json"
"""Under which name a context has whether --json is given anywhere."""

_REPORTED = ("numpy", "gguf", "safetensors", "tokenizers", "huggingface_hub", "torch")


def _report(error: BaseException, output: Output) -> int:
    """Tell the user what went wrong; returns the exit code."""
    output.close()
    stopping.settle()
    if stopping.stopped:
        error = KeyboardInterrupt()
    if debug_wanted(output) and not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    failure = explain(error)
    output.fail(failure)
    return failure.exit_code


class _Group(TyperGroup):
    """The top level: a command's error becomes a sentence and an exit code here."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_JSON] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            # A full disk shows when the buffer is written out, and Python's own attempt at exit
            # would end in a traceback.
            sys.stdout.flush()
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            output = ctx.obj if isinstance(ctx.obj, Output) else Output()
            # Behind a command that there is not, nobody has read it.
            output.json = output.json or ctx.meta[_JSON]
            raise typer.Exit(_report(error, output)) from error
        return result


class _Command(TyperCommand):
    """A command that refuses an option of one value given twice, which typer drops unsaid.

    Its help comes in two tiers, and its function's ``read_args``, if it has one, sees the arguments
    first.
    """

    def get_help_option(self, ctx: Any) -> Any:
        """The option in the panel of its kind, without typer's "<bool>"."""
        found = super().get_help_option(ctx)
        if isinstance(found, TyperOption):
            found.rich_help_panel, found.metavar = ANYWHERE, ""
        return found

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """MODEL, where typer writes {MODEL}."""
        arguments = [each.metavar for each in self.params if isinstance(each, TyperArgument)]
        return ["[OPTIONS]", *filter(None, arguments)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for each in self.params:
            if isinstance(each, TyperArgument):
                # "<str>" says nothing that the name and the sentence do not.
                each.display_type_rich = lambda ctx: None  # type: ignore[method-assign]
        if ctx.meta.get(ALL):
            super().format_help(ctx, formatter)
            return
        with essentials(self) as others:
            self.epilog = f"{others} more options: quantcli {self.name} {ALL}" if others else None
            super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ALL in args:
            ctx.meta[ALL] = True
            args = ["--help"]
        root = ctx.find_root().obj
        if "--json" in args and isinstance(root, Output):
            # Already, so that wrong usage is told as JSON too.
            root.json = True
        args = getattr(self.callback, "read_args", list)(args)
        try:
            given, _, order = self.make_parser(ctx).parse_args(list(args))
        except typer.TyperException as error:
            # So that the hint names this command's help.
            error.ctx = getattr(error, "ctx", None) or ctx  # type: ignore[attr-defined]
            raise
        for index, parameter in enumerate(order):
            once = parameter.param_type_name == "option" and not (
                getattr(parameter, "multiple", False) or getattr(parameter, "is_flag", False)
            )
            if once and parameter in order[:index]:
                raise UsageError(
                    f"{parameter.opts[0]} is given twice",
                    hint=f"leave one out; the last is {given[parameter.name]}",
                )
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="quantcli",
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)


def _versions() -> dict[str, Any]:
    """What a bug report needs to name."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in _REPORTED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {
        "quantcli": quantcli.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system().lower()}-{platform.machine()}",
        "packages": found,
    }


@app.callback()
def _top(
    context: typer.Context,
    show_version: Annotated[
        bool, option("--version", help="Print the version and exit; with --json, in detail.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
    json: Json = False,
) -> None:
    """Make large language models smaller: from a Hugging Face checkpoint straight to GGUF.

    The model is read tensor by tensor, so it need not fit into memory. The
    result runs in llama.cpp, Ollama, LM Studio and all else that reads GGUF.

    See what a model holds:     quantcli inspect ./my-model

    Quantize it to 4 bits:      quantcli quantize ./my-model --bits 4
    """
    context.obj = Output(quiet=quiet, verbose=verbose, debug=debug, json=json)
    if show_version:
        if json:
            context.obj.document("version", 1, _versions())
        else:
            context.obj.line(f"quantcli {quantcli.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)
        raise typer.Exit(2)


for _name in COMMANDS:
    _function = _name.replace("-", "_")
    app.command(_name, cls=_Command)(getattr(import_module(f"quantcli.cli.{_function}"), _function))


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line ``args`` (default: the process's own); returns the exit code."""
    given = sys.argv[1:] if args is None else args
    output = Output(debug="--debug" in given, json="--json" in given)
    try:
        code = get_command(app).main(args, prog_name="quantcli", standalone_mode=False)
        sys.stdout.flush()
    except typer.Abort:
        output.fail(Failure("interrupted", None, INTERRUPTED))
        return INTERRUPTED
    except (Exception, KeyboardInterrupt) as error:
        return _report(error, output)
    finally:
        stopping.settle()
    return code if isinstance(code, int) else 0


def main() -> None:
    """The console script."""
    streams.install()
    stopping.catch_signals()
    code = run()
    sign_of_life.take_away()
    if left_behind.is_set():
        # Python would wait for the threads.
        leave()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
