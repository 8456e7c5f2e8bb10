"""The one sink: data apart from talk, quiet means quiet, terminals and pipes each get their own."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess

import pytest
from support.process import command, environment, run

from quantcli.cli.output import Output, printable
from quantcli.cli.progress import Lines, Meter
from quantcli.events import PhaseBegun, PhaseDone
from quantcli.report.tables import Column, Table, facts
from quantcli.types import Note, Progress

TABLE = Table(
    (Column("Name"), Column("Size", "right")),
    (("a", "1 B"), ("[bold]long name[/bold]", "12 MB")),
    title="Things",
    note="a note",
)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("switch", ["-q", "--quiet"])
def test_quiet_leaves_the_result_and_warnings(place, switch, tmp_path):
    args = [switch, "work"] if place == "before" else ["work", switch]
    done = run(*args, folder=tmp_path)
    assert done.returncode == 0
    assert done.stdout == "/tmp/result.gguf\n"
    assert done.stderr == "warning: a warning\n"


def test_talk_goes_to_standard_error(tmp_path):
    done = run("work", folder=tmp_path)
    assert done.stdout == "/tmp/result.gguf\n"
    assert done.stderr == "a remark\nwarning: a warning\n"


@pytest.mark.parametrize("place", ["before", "after"])
def test_verbose_tells_more(place, tmp_path):
    args = ["-v", "work"] if place == "before" else ["work", "-v"]
    done = run(*args, folder=tmp_path)
    assert "a detail\n" in done.stderr
    assert re.search(r"working: \d\.\d\d s", done.stderr)


def test_json_leaves_no_other_data(tmp_path):
    assert run("work", "--json", folder=tmp_path).stdout == ""


def _on_terminal(args, tmp_path, **env: str) -> tuple[str, str]:
    """Standard output and error, each of them a terminal."""
    found = {}
    masters, slaves = zip(*(pty.openpty() for _ in range(2)), strict=True)
    process = subprocess.Popen(
        [*command(tmp_path), *args], stdout=slaves[0], stderr=slaves[1], env=environment(**env)
    )
    for slave in slaves:
        os.close(slave)
    for index, master in enumerate(masters):
        parts = []
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:
                break
            if not part:
                break
            parts.append(part)
        os.close(master)
        found[index] = b"".join(parts).decode()
    assert process.wait(timeout=30) == 0
    return found[0], found[1]


def test_a_terminal_gets_a_bar(tmp_path):
    data, talk = _on_terminal(["work"], tmp_path, COLUMNS="120")
    assert data == "/tmp/result.gguf\r\n"
    assert "━" in talk
    assert re.search(r"blk\.\d\.weight", talk)
    assert "of 5.00 kB" in talk


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_no_bar_and_no_colour_when_not_wanted(env, tmp_path):
    _, talk = _on_terminal(["work"], tmp_path, **env)
    assert "━" not in talk
    assert "\x1b" not in talk


def test_quiet_shows_no_bar(tmp_path):
    _, talk = _on_terminal(["work", "-q"], tmp_path)
    assert "━" not in talk


def test_a_piped_table_is_plain_and_whole(capsys):
    Output().table(TABLE)
    assert capsys.readouterr().out == (
        "Things\n"
        "Name                     Size\n"
        "a                         1 B\n"
        "[bold]long name[/bold]  12 MB\n"
        "a note\n"
        "\n"
    )


def test_a_piped_list_of_facts_has_no_heading(capsys):
    Output().table(facts([("Layers", "4"), ("Context", "2,048")]))
    assert capsys.readouterr().out == "Layers   4\nContext  2,048\n\n"


def test_an_empty_table_is_nothing(capsys):
    Output().table(Table((Column("Name"),), ()))
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_colours_and_the_text_as_it_is(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    Output().table(TABLE)
    drawn = capsys.readouterr().out
    assert "\x1b[" in drawn
    assert "[bold]long name[/bold]" in drawn


@pytest.mark.parametrize("forced", [False, True])
def test_no_control_sequence_of_a_file_reaches_the_terminal(forced, capsys, monkeypatch):
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
    evil = "blk\x1b]0;owned\x07\n.weight\x9b31m"
    out = Output()
    out.table(Table((Column("Name"),), ((evil,),), title="t"))
    out.heading(evil)
    out.warn(evil)
    found = capsys.readouterr()
    for text in (found.out, found.err):
        assert "\x1b]" not in text
        assert "\x07" not in text
        assert "\x9b" not in text
    assert "blk\\x1b]0;owned\\x07\\n.weight" in found.err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("größer 模型", "größer 模型"),
        ("a\tb\nc", "a\\tb\\nc"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\ud800", "\\ud800"),
        ("a\u202eb", "a\\u202eb"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_a_document_has_a_versioned_schema(capsys):
    Output(json=True).document("thing", 3, {"name": "ä", "value": None})
    text = capsys.readouterr().out
    assert json.loads(text) == {"schema": "quantcli.thing/3", "name": "ä", "value": None}
    assert text.count("\n") == 1


def test_a_number_that_is_not_json_is_never_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        Output(json=True).document("thing", 1, {"value": float("nan")})


def test_with_json_tables_and_lines_are_silent(capsys):
    out = Output(json=True)
    out.table(TABLE)
    out.line("x")
    out.heading("h")
    out.result("p")
    assert capsys.readouterr().out == ""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _lines(steps: list[tuple[float, int, int]]) -> list[str]:
    clock, written = Clock(), []
    display = Lines("working", written.append, clock)
    for now, done, total in steps:
        clock.now = now
        display.update(Progress(done, total, "t"))
    return written


def test_a_short_job_prints_no_lines():
    assert _lines([(0.1 * i, i, 10) for i in range(1, 11)]) == []


def test_lines_come_at_intervals_and_at_the_end():
    written = _lines([(i, i * 10**6, 20 * 10**6) for i in range(1, 21)])
    assert written[0] == "working: 25.0 %, 5.00 MB of 20.0 MB, 800 kB/s, 19 s left, t"
    assert len(written) == 4
    assert written[-1].startswith("working: 100 %, 20.0 MB of 20.0 MB")


def test_the_lines_of_a_long_job_grow_rare():
    hours = 5
    written = _lines([(i, i, hours * 3600) for i in range(1, hours * 3600 + 1)])
    assert 50 < len(written) < 200


def test_the_rate_is_of_this_run():
    clock = Clock()
    meter = Meter(clock)
    meter.measure(Progress(900, 1000, "t"))
    clock.now = 10
    assert meter.measure(Progress(950, 1000, "t")) == "950 B of 1.00 kB, 5 B/s, 10 s left"


def test_each_unit_is_counted_as_what_it_is():
    clock = Clock()
    meter = Meter(clock)
    meter.measure(Progress(0, 4, "x", "steps"))
    clock.now = 8
    assert meter.measure(Progress(2, 4, "x", "steps")) == "2 of 4 steps, 4.0 s each, 8.0 s left"
    assert meter.measure(Progress(16, 16, "g", "groups")) == "16 of 16 groups"
    # Work that begins anew is measured from there.
    assert meter.measure(Progress(0, 4, "y", "steps")) == "0 of 4 steps"
    clock.now = 9
    assert meter.measure(Progress(4, 4, "y", "steps")) == "4 of 4 steps, 4 steps/s"


def test_an_unknown_total_is_no_mishap():
    assert _lines([(10, 0, 0)]) == ["working: 100 %, 0 B of 0 B, t"]


def test_a_phase_that_begins_anew_measures_anew(capsys, monkeypatch):
    monkeypatch.setattr("quantcli.cli.progress.FIRST_LINE_S", -1.0)
    out = Output()
    for name, progress in (("first", Progress(50, 100, "a")), ("second", Progress(1, 100, "b"))):
        for event in (PhaseBegun(name), progress, PhaseDone(name, 0.1)):
            out.event(event)
    out.event(Note("done"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("first: 50.0 %")
    assert lines[1].startswith("second: 1.00 %")
    assert lines[2] == "done"
