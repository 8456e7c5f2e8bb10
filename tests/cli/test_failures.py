"""What goes wrong is one sentence, a hint and the right exit code; tracebacks only on demand."""

from __future__ import annotations

import errno

import pytest
from support.process import run
from typer.testing import CliRunner

from quantcli import errors
from quantcli.cli import app
from quantcli.cli.failures import explain

CASES = {
    "source": (1, "error: m.gguf: is cut short\nhint: download it again\n"),
    "gate": (3, "error: perplexity 9.7 is above 9.5\n"),
    "usage": (2, "error: there is no type Q4_KM\nhint: did you mean Q4_K_M?\n"),
    "file": (
        1,
        "error: /nonexistent/folder/x: no such file or directory\nhint: check the path\n",
    ),
    "memory": (1, "error: there is not enough memory\nhint: use fewer --threads\n"),
    "interrupt": (130, "error: interrupted\n"),
    "socket": (1, "error: broken pipe\n"),
    "bug": (
        1,
        "error: internal error (KeyError: 'nobody expects me'); this is a bug in quantcli\n"
        "hint: run again with --debug for the traceback\n",
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_an_error_is_a_sentence(kind, tmp_path):
    done = run("fail", kind, folder=tmp_path)
    assert (done.returncode, done.stderr) == CASES[kind]
    assert done.stdout == ""


@pytest.mark.parametrize("where", ["before", "variable"])
@pytest.mark.parametrize("kind", ["bug", "source"])
def test_a_traceback_is_shown_on_demand(kind, where, tmp_path):
    before = ["--debug"] if where == "before" else []
    env = {"QUANTCLI_DEBUG": "1"} if where == "variable" else {}
    done = run(*before, "fail", kind, folder=tmp_path, env=env)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith(CASES[kind][1])


def test_debug_zero_is_no_debug(tmp_path):
    assert (
        "Traceback" not in run("fail", "bug", folder=tmp_path, env={"QUANTCLI_DEBUG": "0"}).stderr
    )


USAGE = {
    "unknown command": (["inspct", "m"], "no such command 'inspct'", "did you mean inspect?"),
    "unknown option": (["inspect", "m", "--tensor"], "no such option: --tensor", "--tensors"),
    "unknown first option": (["--jsn"], "no such option: --jsn", "did you mean --json?"),
    "far option": (["inspect", "m", "--wxyz"], "no such option: --wxyz", "quantcli inspect --help"),
    "no model": (["inspect"], "missing argument 'MODEL'", "see 'quantcli inspect --help'"),
    "bad number": (["inspect", "m", "--top", "x"], "invalid value for '--top'", "--help"),
    "too small": (["inspect", "m", "--threads", "0"], "greater than or equal to 1", "--help"),
    "two models": (["inspect", "m", "n"], "unexpected extra argument(s) (n)", "--help"),
    "two dtypes": (
        ["quantize", "m", "--dtype", "F16", "--dtype", "F32"],
        "--dtype is given twice",
        "the last is F32",
    ),
    "quiet and verbose": (["-q", "inspect", "m", "-v"], "exclude each other", "leave one"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_ends_with_2(case, capsys):
    args, message, hint = USAGE[case]
    assert app.run(args) == 2
    found = capsys.readouterr()
    first, second = found.err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert second.startswith("hint: ")
    assert hint in second
    assert found.out == ""


def test_wrong_usage_in_a_process_of_its_own():
    done = run("inspct")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no such command 'inspct'\nhint: did you mean inspect?\n"


def test_in_process_the_same_codes():
    result = CliRunner().invoke(app.app, ["inspect", "/nonexistent/model"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: /nonexistent/model: there is no such file or folder")


@pytest.mark.parametrize(
    "kind",
    [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.QuantcliError)
    ],
)
def test_every_error_of_ours_keeps_its_message_hint_and_code(kind):
    failure = explain(kind("what happened", hint="what to do"))
    assert (failure.message, failure.hint) == ("what happened", "what to do")
    assert failure.exit_code == kind.exit_code
    # A shell says 128 and the signal's number of what a signal ended; SIGINT is 2.
    interrupted = issubclass(kind, errors.InterruptedRunError)
    assert failure.exit_code in ((130,) if interrupted else (1, 2, 3))


def test_an_error_of_the_system_names_the_file_and_the_next_step():
    failure = explain(OSError(errno.ENOSPC, "No space left on device", "/data/m.gguf"))
    assert failure.message == "/data/m.gguf: no space left on device"
    assert failure.hint == "free some space or choose another disk"


def test_an_error_without_a_text_still_says_something():
    assert explain(OSError()).message
    assert "RuntimeError" in explain(RuntimeError()).message
