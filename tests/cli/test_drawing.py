"""Tables on terminals of any width."""

from __future__ import annotations

import pytest
from rich.console import Console
from support.process import run

from quantcli.cli.drawing import draw, shorten
from quantcli.report.tables import Column, Table, facts


def drawn(table: Table, width: int) -> list[str]:
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(draw(table, str, width))
    return [line.rstrip() for line in capture.get().splitlines()]


COLUMNS = (
    Column("model"), Column("size", "right"), Column("perplexity", "right"),
    Column("±", "right", drop=2), Column("KLD mean", "right"), Column("99 %", "right", drop=1),
)  # fmt: skip
ROW = ("/home/somebody/models/llama-3.1-8b-instruct-Q4_K_M.gguf", "4.92 GB", "7.1234", "0.0456",
       "0.03123", "0.2345")  # fmt: skip


@pytest.mark.parametrize("width", [200, 120, 80, 72, 60])
def test_headings_and_numbers_stay_whole(width):
    lines = drawn(Table(COLUMNS, (ROW,)), width)
    assert max(map(len, lines)) <= width
    heading, _, row = lines[:3]
    for column, cell in zip(COLUMNS[1:], ROW[1:], strict=True):
        assert (column.header in heading) is (cell in row)
        assert column.drop or cell in row


def test_columns_go_in_order_and_are_told():
    both = drawn(Table(COLUMNS, (ROW,)), 58)
    assert both[-1] == "No room for: ±."
    assert drawn(Table(COLUMNS, (ROW,)), 50)[-1] == "No room for: ±, 99 %."
    assert drawn(Table(COLUMNS, (ROW,)), 200)[-1] == drawn(Table(COLUMNS, (ROW,)), 200)[2]


def test_a_path_loses_folders_first():
    assert shorten("/a/long/folder/m-Q4_K_M.gguf", 20) == "…/m-Q4_K_M.gguf"
    assert shorten("/a/long/folder/m-Q4_K_M.gguf", 10) == "m-Q…M.gguf"
    assert shorten("blk.10.attn_output.weight", 19) == "blk.10.attn_output…"
    assert shorten("blk.10.attn_output.weight", 15) == "blk.10.….weight"
    assert shorten("short", 15) == "short"


@pytest.mark.parametrize("width", range(3, 30))
def test_a_short_name_is_not_wider_than_asked(width):
    from rich.cells import cell_len

    for name in ("模型权重文件名很长.gguf", "/模型/权重文件名很长的模型.gguf", "x" * 40, "a/b/c/d"):
        assert cell_len(shorten(name, width)) <= width


def test_sentences_break_between_words_before_names_are_shortened():
    columns = (Column("tensor"), Column("size", "right"), Column("why"))
    why = "attn_v in the first and last eighth of the layers"
    lines = drawn(Table(columns, (("blk.0.attn_v.weight", "26.9 kB", why),)), 60)
    assert lines[2].startswith("blk.0.attn_v.weight")
    said = " ".join(" ".join(line[30:].split()) for line in lines[2:])
    assert said == why


def test_facts_wrap():
    lines = drawn(facts([("Architecture", "word " * 30)]), 40)
    assert max(map(len, lines)) <= 40
    assert lines[0].startswith("Architecture  word")


def test_nothing_is_lost_in_a_pipe(mini):
    done = run("quantize", mini, "--bits", "4", "--dry-run", env={"COLUMNS": "40"})
    assert "blk.3.attn_output.weight" in done.stdout
    assert (
        "attn_v in the first and last eighth of the layers and every third between" in done.stdout
    )


@pytest.mark.parametrize(
    "args", [["quantize", "MINI", "--bits", "4", "--dry-run"], ["inspect", "MINI", "--stats"],
             ["inspect", "MINI", "--tensors"], ["inspect", "MINI", "--fit", "8G"],
             ["inspect", "MINI", "-v"]],
)  # fmt: skip
def test_commands_at_80_columns(args, mini):
    env = {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": "80"}
    args = [str(mini) if arg == "MINI" else arg for arg in args]
    done = run(*args, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    # A name that was folded would go on in a line with nothing else.
    names = [line for line in lines if "weight" in line]
    assert all(len(line.split()) > 3 for line in names if "Tensor" not in line)


def test_names_stay_different_as_long_as_columns_can_go():
    columns = (Column("Tensor"), Column("In GGUF", drop=1), Column("Size", "right"),
               Column("Bits", "right", drop=2))  # fmt: skip
    rows = tuple(
        (f"model.layers.{layer}.self_attn.{name}_proj.weight", f"blk.{layer}.attn_{name}.weight",
         "65.5 kB", "16.00")
        for layer in range(12) for name in "qkvo"
    )  # fmt: skip
    for width in (80, 60, 50):
        lines = drawn(Table(columns, rows), width)
        assert len({line.split()[0] for line in lines[2:50]}) == 48
        assert max(map(len, lines)) <= width
    # Where nothing can go they get alike rather than wide.
    assert max(map(len, drawn(Table(columns[::2], tuple(row[::2] for row in rows)), 20))) <= 20


def test_a_long_value_is_cut_and_told():
    table = facts([("tokens", "word " * 10_000)])
    lines = drawn(table, 60)
    assert len(lines) < 50
    assert lines[-1] == "Long values are cut here; in a pipe they are whole."


def test_notes_and_titles_hold_long_names():
    name = "a-model-whose-name-is-longer-than-a-terminal-Q4_K_M.gguf"
    table = Table(COLUMNS, (ROW,), title=f"of {name}", note=f"Close, as Q4_K_M: {name}, {name}")
    for line in drawn(table, 60):
        assert len(line) <= 60
        assert "Q4_K_M.gguf" in line or "longer-than" not in line
