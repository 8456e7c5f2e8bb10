"""Every view in real terminals of 80 and of 120 columns.

What must hold of each: no line is wider than the terminal, a header stands on one line, cells stand
below their headings, words are whole or shortened by their middle, and what is left out is told.
What the words are is known from the same command in a pipe, which shortens nothing.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
from support.forks import Forks
from support.terminal import Screen, cells, run_in_terminal

TEXT = Path(__file__).parents[1] / "data" / "pride-and-prejudice.txt"
LONG = "a-model-whose-name-is-really-longer-than-most-columns-of-a-terminal-Instruct-2512"
CHINESE = "一个名字比终端大多数列还要长得多的语言模型-指令微调版本-二零二六年十二月"

VIEWS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "overview": ("inspect {model}", 0, ("--type --bits Size Bits per weight Of today's size",)),
    "overview of a file": ("inspect {chinese}", 0, ("Type Tensors Weights Size Share",)),
    "all types": ("inspect {model} -v", 0, ("--type --bits Size Bits per weight",)),
    "tensors": ("inspect {model} --tensors", 0, ("Tensor In GGUF Shape Type Size",)),
    "tensors of a file": ("inspect {q4} --tensors", 0, ("Tensor Shape Type Size Bits",)),
    "statistics": (
        "inspect {model} --stats", 0,
        ("Min Max", "Kurtosis Outliers Top channel",
         "Tensor Channel Largest Median channel Outliers"),
    ),
    "key-values": ("inspect {q4} --kv", 0, ("Key Kind Value", "are whole")),
    "fit": (
        "inspect {model} --fit 2G --ctx 1k", 0,
        ("Run it with: llama-cli -m FILE", "--type weights cache compute total on GPU in RAM"),
    ),
    "plan": ("quantize {model} --bits 4 --dry-run", 0,
             ("tensor shape from to size why", "peak memory")),
    "plan of a method": ("quantize {model} --method gptq --calibrate {text} --dry-run", 0,
                         ("tensor shape from to size why", "scratch disk")),
    "plan of a folder": ("quantize {model} --to gptq --dry-run", 0,
                         ("tensor shape from to size", "peak memory")),
    "plan of a set": ("quantize {model} --set popular -o out/ --dry-run", 0,
                      ("type bits per weight size", "need an importance matrix")),
    "plan of layouts": ("quantize {model} --to gptq,compressed-tensors -o out/ --dry-run", 0,
                        ("type bits per weight size",)),
    "file": ("quantize {model} --bits 4 -o {new}/{name}-Q4_K_M.gguf", 0,
             ("to run it: llama-cli -m",)),
    "set": ("quantize {model} --type Q4_0,Q8_0 -o {new}/", 0, ("2 of 2 outputs made",)),
    "folder": ("quantize {model} --to compressed-tensors -o {new}/{name}-W4A16", 0,
               ("to run it: vllm serve",)),
    "calibration": ("calibrate {model} --data {text} --chunks 2 -o {new}/{name}.calib.gguf", 0,
                    ("2 windows of 512 tokens",)),
    "importance": ("inspect {calib}", 0, ("Entry Columns Unseen Zero Smallest Largest Mean",)),
    "perplexity": ("eval-ppl {q4} --data {text} --chunks 2", 0,
                   ("model size bits/weight perplexity ±",)),
    "divergence": ("eval-ppl {q4} --reference {base} --data {text} --chunks 2", 0,
                   ("same top",)),
    "comparison": (
        "eval-ppl {q4} {q2} {chinese} --reference {base} --data {text} --chunks 2 --greedy 4", 0,
        ("same top", "Much worse, as Q2_K"),
    ),
    "limits": (
        "eval-ppl {q4} {q2} --reference {base} --data {text} --data {other} --chunks 2 "
        "--max-kld 0.01", 3, ("same top", "is above --max-kld 0.01"),
    ),
    "speed": ("eval-ppl {q4} {q2} --speed", 0, ("model size", "memory in t/s out t/s")),
    "conversations": ("eval-ppl {q4} --data {chat} --chunks 2", 1, ("chat template",)),
    "verification": ("export {q4} --verify --against {model}", 0,
                     ("tensor shape type size relative error largest error", "verdict sound")),
    "soundness": ("export {chinese} --verify", 0, ("verdict sound",)),
    "plan of an export": ("export {q4} --to hf --dry-run", 0, ("free disk",)),
    "plan of an upload": ("export {q4} --to hub --repo org/name --dry-run", 0, ("file size",)),
    "no such model": ("inspect {model}-that-is-not-there", 1, ("there is no such file",)),
    "no such type": ("quantize {model} --type Q4_KM", 2, ("did you mean", "Q4_K_M")),
    "no base": ("eval-ppl {q4} --max-kld 1 --data {text}", 2, ("--reference",)),
    "exists": ("quantize {model} --type Q4_0 -o {q4}", 1, ("--force",)),
    "help": ("--help", 0, ("Usage: quantcli",)),
    **{f"help of {name}": (f"{name} --help", 0, (f"Usage: quantcli {name}",))
       for name in ("quantize", "export", "calibrate", "eval-ppl", "inspect")},
}  # fmt: skip


@pytest.fixture(scope="module")
def names(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the views are of: a model and files with long names."""
    from quantcli.cli.app import run as run_here

    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("views")
    (folder / LONG).symlink_to(mini)
    found = {"model": str(folder / LONG), "text": str(TEXT), "name": LONG, "folder": str(folder)}
    for key, type_name in {"q4": "Q4_0", "q2": "Q2_K", "base": "BF16"}.items():
        path = folder / f"{LONG}-{type_name}.gguf"
        assert run_here(["quantize", str(mini), "--type", type_name, "-q", "-o", str(path)]) == 0
        found[key] = str(path)
    found["chinese"] = str(folder / f"{CHINESE}-Q2_K.gguf")
    os.link(found["q2"], found["chinese"])
    found["other"] = str(folder / f"another-text-with-{LONG}.txt")
    Path(found["other"]).write_text(TEXT.read_text(encoding="utf-8")[2_000:12_000], "utf-8")
    found["chat"] = str(folder / "chat.jsonl")
    Path(found["chat"]).write_text('{"messages": [{"role": "user", "content": "Good day"}]}\n')
    found["calib"] = str(folder / f"{LONG}.calib.gguf")
    words = ["calibrate", str(mini), "--data", str(TEXT), "--chunks", "2", "-q"]
    assert run_here([*words, "-o", found["calib"]]) == 0
    return found


@pytest.fixture(scope="module")
def show(
    names: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, int | None], Screen]]:
    """``show(view, columns)``: what it leaves on the terminal; None is a pipe."""
    new = tmp_path_factory.mktemp("new")
    with Forks(tmp_path_factory.mktemp("forks")) as forks:

        @cache
        def screen(view: str, columns: int | None) -> Screen:
            line, code, _ = VIEWS[view]
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            words = shlex.split(line.format(new=new, **names))
            found = run_in_terminal(forks, words, columns, names["folder"])
            assert found.code == code, found.lines
            return found

        yield screen


@pytest.mark.slow
@pytest.mark.parametrize("view", VIEWS)
def test_a_view(view: str, show: Callable[[str, int | None], Screen]) -> None:
    whole = show(view, None)
    words = {word for line in whole.lines for word in _words(line)}
    narrow, wide = (
        [line for line in show(view, columns).lines if "━" not in line] for columns in (80, 120)
    )
    for columns, lines in ((80, narrow), (120, wide)):
        # What is to be copied is printed whole: a path, a command.
        flowing = [line for line in lines if " " in line.strip() and not _is_step(line)]
        assert [line for line in flowing if cells(line) > columns] == []
        spaced = [" ".join(line.split()) for line in lines]
        for header in VIEWS[view][2]:
            assert any(header in line for line in (*spaced, " ".join(spaced))), header
        for line in lines:
            if _is_step(line):
                continue
            unknown = [word for word in _words(line) if word not in words and "…" not in word]
            assert not _without_talk(unknown), line
        for header, rows in _tables(lines):
            for row in rows:
                assert not _astray(row, header), f"{header}\n{row}"
            assert _is_told(header, whole.lines, _left_out(lines)), header
    assert _left_out(wide) <= _left_out(narrow)


def test_a_comparison_to_read(show: Callable[[str, int | None], Screen]) -> None:
    """Three files with long names at 80 columns: the types and the figures to compare by stay."""
    lines = [line for line in show("comparison", 80).lines if "━" not in line]
    ((header, rows),) = _tables(lines)
    assert _split(header) == [
        "model", "size", "perplexity", "KLD mean", "99 %", "99.9 %", "same top"
    ]  # fmt: skip
    assert [_split(row)[0] for row in rows] == [
        "a-model…-2512-BF16.gguf", "a-model…-2512-Q4_0.gguf", "a-model…-2512-Q2_K.gguf",
        "一个名…十二月-Q2_K.gguf",
    ]  # fmt: skip
    assert _left_out(lines) == {"bits/weight", "±", "greedy"}


def _is_step(line: str) -> bool:
    """Whether it is the next step, which a pipe is not told."""
    return re.match(r"to (run|compare) \w+: ", line) is not None


def _words(line: str) -> list[str]:
    """What could be folded: words of letters, without what rounds off a sentence."""
    found = (word.strip(".,;:()'\"│") for word in line.split())
    return [word for word in found if re.search(r"[^\W\d_]", word)]


def _without_talk(words: Sequence[str]) -> list[str]:
    """Without what a terminal says of itself."""
    said = {"No", "room", "for", "Long", "values", "are", "cut", "here", "in", "a", "pipe", "they"}
    return [word for word in words if word not in said | {"whole"}]


def _tables(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each header line of a table with the rows below it."""
    for place, line in enumerate(lines):
        if re.fullmatch(r"─+", line):
            rows = []
            for row in lines[place + 1 :]:
                if not row or cells(row) > len(line) or not re.search(r"  ", row):
                    break
                rows.append(row)
            yield lines[place - 1], rows


def _spans(line: str) -> list[tuple[int, int]]:
    """Where the cells of a line begin and end, in columns of the terminal."""
    return [
        (cells(line[: found.start()]), cells(line[: found.end()]))
        for found in re.finditer(r"\S+(?: \S+)*", line)
    ]


def _astray(row: str, header: str) -> list[tuple[int, int]]:
    """The cells that begin where no heading begins and end where none ends."""
    headings = _spans(header)
    starts, ends = {start for start, _ in headings}, {end for _, end in headings}
    return [
        (start, end)
        for start, end in _spans(row)
        if start not in starts and end not in ends and row[start:end] != "…"
    ]


def _left_out(lines: Sequence[str]) -> set[str]:
    text = " ".join(lines)
    return {
        name.strip() for found in re.findall(r"No room for: (.*?)\.(?: |$)", text)
        for name in found.split(",")
    }  # fmt: skip


def _is_told(header: str, whole: Sequence[str], left_out: set[str]) -> bool:
    """Whether a line of the pipe has the header's cells and, beyond them, those that are told."""
    shown = _split(header)
    for line in whole:
        others = _split(line)
        for name in shown:
            if name in others:
                others.remove(name)
        if len(others) == len(_split(line)) - len(shown) and set(others) <= left_out:
            return True
    return False


def _split(line: str) -> list[str]:
    return re.split(r" {2,}", line.strip())
