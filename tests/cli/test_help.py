"""Every command and option explains itself, and help costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.process import environment, run
from typer.main import get_command

from quantcli.cli.app import COMMANDS, app

ROOT = get_command(app)
NAMES = sorted(ROOT.commands)
HEAVY = (
    "numpy", "gguf", "torch", "transformers", "tokenizers", "huggingface_hub", "ml_dtypes",
    "msgspec", "yaml",
)  # fmt: skip
LIBRARY_OPTIONS = {"help", "install_completion", "show_completion"}


def _parameters():
    for owner in (ROOT, *ROOT.commands.values()):
        for parameter in owner.params:
            yield pytest.param(owner, parameter, id=f"{owner.name}-{parameter.name}")


def test_the_commands_are_the_table():
    assert set(NAMES) == set(COMMANDS)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_explains_itself_with_examples(name):
    text = ROOT.commands[name].help
    first, *rest = text.split("\n\n")
    assert first.endswith(".")
    assert len(first) <= 100
    examples = [part for part in rest if f"quantcli {name} " in part]
    assert examples
    assert all("\n" not in part for part in examples), "the help would join the lines"


@pytest.mark.parametrize(("owner", "parameter"), list(_parameters()))
def test_every_parameter_has_help(owner, parameter):
    text = parameter.help or ""
    assert len(text) > 10
    if parameter.name not in LIBRARY_OPTIONS:
        assert text.endswith((".", "?")), text


def test_a_flag_means_the_same_in_every_command():
    seen: dict[str, tuple[str, str]] = {}
    for owner in (ROOT, *ROOT.commands.values()):
        for parameter in owner.params:
            for flag in (*parameter.opts, *parameter.secondary_opts):
                if not flag.startswith("-") or flag in ("--help", "-h"):
                    continue
                known = seen.setdefault(flag, (parameter.name, owner.name))
                assert known[0] == parameter.name, f"{flag} of {owner.name} and of {known[1]}"


def test_help_lists_the_commands():
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in NAMES)
    assert done.stderr == ""
    assert run("-h").stdout == done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command(name):
    done = run(name, "-h")
    assert done.returncode == 0
    assert f"quantcli {name}" in done.stdout


def test_no_command_shows_the_help_and_is_a_usage_error():
    done = run()
    assert done.returncode == 2
    assert "inspect" in done.stdout


@pytest.mark.parametrize("args", [["--help"], *[[name, "--help"] for name in NAMES]])
def test_help_imports_nothing_heavy(args):
    code = (
        "import sys\n"
        "from quantcli.cli.app import run\n"
        f"code = run({args!r})\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'imported {found}' if found else code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=environment(), timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("switches", [["--version", "--json"], ["--json", "--version"]])
def test_version_in_detail(switches):
    import json

    import quantcli

    found = json.loads(run(*switches).stdout)
    assert found["schema"] == "quantcli.version/1"
    assert found["quantcli"] == quantcli.__version__
    assert found["packages"]["numpy"]


def test_version():
    import quantcli

    assert run("--version").stdout == f"quantcli {quantcli.__version__}\n"


def test_a_shell_completes_commands():
    words = {"COMP_WORDS": "quantcli ins", "COMP_CWORD": "1"}
    assert run(env={"_QUANTCLI_COMPLETE": "complete_bash", **words}).stdout.split() == ["inspect"]
