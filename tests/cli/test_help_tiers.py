"""Help in two tiers, and what shells complete."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from quantcli.cli.app import COMMANDS, app
from quantcli.cli.help_tiers import ESSENTIAL

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "quantcli" / "cli" / "completions.json"


def ask(line: str, shell: str = "bash", *, splits: bool = False) -> list[str]:
    """What a shell would offer at the end of a line."""
    words = line.replace("=", " = ").split(" ") if splits else line.split(" ")
    given = {
        "_QUANTCLI_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    command = [sys.executable, "-X", "importtime", "-m", "quantcli"]
    done = subprocess.run(
        command, env=os.environ | given, capture_output=True, text=True, timeout=60, check=True
    )
    # Nothing of the program itself is loaded, or a key press would take a third of a second.
    assert "typer" not in done.stderr
    assert "rich" not in done.stderr
    return done.stdout.splitlines()


def help_of(command: str, flag: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "quantcli", command, flag],
        env=os.environ | {"COLUMNS": "80"}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("command", ESSENTIAL)
def test_essentials_are_options_of_the_command(command: str) -> None:
    names = {each.name for each in get_command(app).commands[command].params}  # type: ignore[attr-defined]
    assert set(ESSENTIAL[command]) <= names


@pytest.mark.parametrize("command", COMMANDS)
def test_all_options_are_in_the_second_tier(command: str) -> None:
    full, short = help_of(command, "--help-all"), help_of(command, "--help")
    options = [each for each in get_command(app).commands[command].params  # type: ignore[attr-defined]
               if each.param_type_name == "option"]  # fmt: skip
    missing = [each.opts[0] for each in options if each.opts[0] not in full]
    assert not missing
    hidden = [each for each in options if f"{each.opts[0]} " not in short]
    assert bool(hidden) == (command in ESSENTIAL)
    assert (f"quantcli {command} --help-all" in short) == (command in ESSENTIAL)
    assert max(map(len, short.splitlines())) <= 80


def test_the_table_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make-reference"))["completions"]()
    assert TABLE.read_text(encoding="utf-8") == made, "run scripts/make-reference"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("quantcli qu", ["quantize"]),
        ("quantcli quantize m --dry", ["--dry-run"]),
        ("quantcli quantize m --type q4_k_", ["Q4_K_M", "Q4_K_S"]),
        ("quantcli quantize m --type Q8_0,Q4_K_M,Q4_K_", ["Q8_0,Q4_K_M,Q4_K_S"]),
        ("quantcli quantize m --to gptq", ["gptq", "gptq-v2"]),
        ("quantcli quantize --range m", ["minmax", "mse"]),
        ("quantcli quantize m --method a", ["awq"]),
        ("quantcli quantize m --recipe q4_0", ["q4_0-pure"]),
        ("quantcli eval-ppl a.gguf --engine t", ["torch"]),
        ("quantcli export a.gguf --to oll", ["ollama"]),
        ("quantcli quantize ./mod", []),
        ("quantcli quantize m --imatrix fi", []),
        ("quantcli nonsense --ty", []),
    ],
)
def test_what_bash_is_offered(line: str, offered: list[str]) -> None:
    assert ask(line) == offered


def test_a_value_behind_an_equals_sign() -> None:
    assert ask("quantcli quantize m --type=Q4_K_", splits=True) == ["Q4_K_M", "Q4_K_S"]
    assert ask("quantcli quantize m --to=aw", "fish") == ["--to=awq"]


def test_zsh_and_fish_are_answered_in_their_ways() -> None:
    (line,) = ask("quantcli quantize m --to mlx", "zsh")
    assert line == """_arguments '*: :(("mlx"))'"""
    assert ask("quantcli quantize ./mod", "zsh") == ["_files"]
    (line,) = ask("quantcli quantize m --dry", "fish")
    assert line.startswith("--dry-run\tPrint the exact plan")


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs bash")
def test_in_a_real_bash() -> None:
    """The script that is installed, run by bash as its completion would run it."""
    script = subprocess.run(
        [sys.executable, "-m", "quantcli", "--show-completion", "bash"],
        env=os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    name = next(line.split("(")[0] for line in script.splitlines() if line.endswith("() {"))
    program = Path(sys.executable).parent / "quantcli"
    typed = f"COMP_WORDS=({program} quantize m --type Q3_K_); COMP_CWORD=4; {name} {program}"
    done = subprocess.run(
        ["bash", "-c", f'{script}\n{typed}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["Q3_K_L", "Q3_K_M", "Q3_K_S"]
