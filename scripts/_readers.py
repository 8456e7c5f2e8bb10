"""What check-vllm and its like share: folders of every scheme, loaded by somebody else's program.

Each folder is made of the small model of this repository (experts: of a tiny random one) and loaded
in a process of its own, a fork of one that has imported the reader, which prints the mean
log-probability of a text. It is compared with transformers' on the weights that the folder decodes
to. Only the standard library is imported above, since the reader's own environment runs this file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "data" / "bookworm-mini"
TEXT = ROOT / "tests" / "data" / "pride-and-prejudice.txt"
TOKENS = 200
SHOWN = 200
"""Characters of a reader's message that the table quotes."""


DONE = "done with it"
NO_KERNEL, REFUSED = "no kernel", "refused, as a remark says"

Server = subprocess.Popen[str]


@dataclass(frozen=True)
class Reader:
    """A program that loads model folders, and what it is tried with.

    ``plain`` and ``experts`` are what is made of the small model and of a tiny mixture of experts:
    options of quantize by what the table calls them, None for the checkpoint itself. ``load`` gives
    the log-probabilities of tokens but the first, ``module`` is what takes long to import.
    ``no_kernel`` finds messages of a reader that takes a folder and lacks the code to run it here,
    which is told from a refusal; folders that ``refuses`` finds are refused on any machine, as a
    remark of quantcli says. ``exact`` is the difference of means that is none, ``rounded`` the
    same for the schemes that ``rounds`` finds, under which it computes with rounded activations.
    A reader that quantizes as well makes folders of its own: ``make`` is given the small model, the
    options that ``made`` has by the table's names, and the folder.
    """

    name: str
    packages: tuple[str, ...]
    unfit: tuple[str, ...]
    plain: Mapping[str, str | None]
    experts: Mapping[str, str | None]
    load: Callable[[str, list[int]], list[float]]
    module: str
    no_kernel: str
    exact: float
    rounded: float = 0.0
    rounds: str = "$^"
    refuses: str = "$^"
    variables: Mapping[str, str] | None = None
    made: Mapping[str, str] = field(default_factory=dict)
    make: Callable[[str, str, str], None] | None = None


@dataclass(frozen=True)
class Found:
    """What became of one folder: two means, or what the reader said."""

    name: str
    theirs: float | None = None
    ours: float = 0.0
    said: str = ""
    verdict: str = "**refused**"
    limit: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether there is nothing to mend."""
        return self.verdict in (NO_KERNEL, REFUSED) or (
            self.differs is not None and self.differs <= self.limit
        )

    @property
    def differs(self) -> float | None:
        """By how much the means differ."""
        return None if self.theirs is None else abs(self.theirs - self.ours)

    @property
    def cells(self) -> list[str]:
        """The line of the table."""
        if self.theirs is not None and self.differs is not None:
            verdict = "loads" if self.is_good else "**other predictions**"
            return [self.name, verdict, f"{self.theirs:.3f}", f"{self.ours:.3f}"]
        return [self.name, f"{self.verdict}: {self.said}", "", f"{self.ours:.3f}"]


def check(reader: Reader, script: str) -> None:
    """The script's main program; exits."""
    if sys.argv[1:] == ["--serve"]:
        serve(reader)
        sys.exit()
    parser = argparse.ArgumentParser(description=f"Load folders of every scheme in {reader.name}.")
    parser.add_argument("--env", type=Path, default=ROOT / "build" / reader.name, metavar="DIR")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the table's names")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a page")
    parser.add_argument("--verbose", action="store_true", help="print all that the reader says")
    args = parser.parse_args()
    python = make_environment(reader, args.env)
    results = []
    with tempfile.TemporaryDirectory() as name:
        server = start(reader, script, python)
        for found in try_all(reader, server, re.compile(args.only), Path(name), args.verbose):
            results.append(found)
            print("| " + " | ".join(found.cells) + " |", flush=True)
    if args.write:
        put(args.write, reader, results)
    bad = [found.name for found in results if not found.is_good]
    print(f"{len(results)} folders, {len(bad)} to look at: {', '.join(bad)}")
    sys.exit(bool(bad))


def make_environment(reader: Reader, folder: Path) -> Path:
    """The Python of an environment with the reader's packages; it is made once."""
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = " ".join([*reader.packages, "-", *reader.unfit])
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"making {folder}, which takes some minutes and gigabytes", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "-q"]
        subprocess.run([*pip, "install", *reader.packages], check=True)
        if reader.unfit:
            subprocess.run([*pip, "uninstall", "-y", *reader.unfit], check=True)
        stamp.write_text(wanted)
    return python


def try_all(
    reader: Reader, server: Server, only: re.Pattern[str], scratch: Path, verbose: bool
) -> Iterator[Found]:
    """Make, load and compare each folder."""
    mixture = scratch / "mixture"
    folder, decoded = scratch / "folder", scratch / "decoded"
    for name in filter(only.search, reader.made):
        shutil.rmtree(folder, ignore_errors=True)
        job = {"model": str(MODEL), "options": reader.made[name], "folder": str(folder)}
        told = ask(reader, server, job, scratch / "log", verbose)
        if folder.exists():
            quantcli(folder, ["--to", "hf", "--type", "F32"], decoded)
            yield compare(reader, server, name, folder, decoded, verbose)
        else:
            yield Found(name, said=last_error(told), verdict="**not made**")
    shutil.rmtree(folder, ignore_errors=True)
    for model, cases in ((MODEL, reader.plain), (mixture, reader.experts)):
        wanted = {name: options for name, options in cases.items() if only.search(name)}
        if wanted and model == mixture:
            build_mixture(mixture)
        for name, options in wanted.items():
            if options is not None:
                where = "" if "--to " in options else "--to compressed-tensors "
                quantcli(model, shlex.split(where + options), folder)
            source = model if options is None else folder
            quantcli(source, ["--to", "hf", "--type", "F32"], decoded)
            yield compare(reader, server, name, source, decoded, verbose)


def quantcli(model: Path, options: Sequence[str], output: Path) -> None:
    """Quantize into a folder; exits with the program's own words when it fails."""
    command = [sys.executable, "-m", "quantcli", "quantize", str(model), *options]
    done = subprocess.run(
        [*command, "-q", "--force", "-o", str(output)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{shlex.join(options)}: {done.stderr}")


def build_mixture(folder: Path) -> None:
    """A tiny Qwen3-MoE of random weights, as the tests make it, with heads of 64."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import tiny_models

    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128}
    heads = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_models.build("qwen3-moe", folder, dtype="bfloat16", changes=sizes | heads)


def start(reader: Reader, script: str, python: Path) -> Server:
    """The reader's process, importing."""
    variables = os.environ | {"PYTHONPATH": ""} | dict(reader.variables or {})
    return subprocess.Popen(
        [python, script, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=variables,
    )  # fmt: skip


def serve(reader: Reader) -> None:
    """Load folder after folder, each in a fork; what it prints goes into a file."""
    importlib.import_module(reader.module)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                if reader.make and "options" in job:
                    reader.make(job["model"], job["options"], job["folder"])
                else:
                    found = reader.load(job["folder"], job["ids"])
                    print(json.dumps({"mean": sum(found) / len(found)}), flush=True)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(child, 0)
        print(DONE, flush=True)


def compare(
    reader: Reader, server: Server, name: str, folder: Path, decoded: Path, verbose: bool
) -> Found:
    """Load one folder in the reader's environment, and its weights in transformers."""
    ids, ours = by_transformers(decoded)
    job = {"folder": str(folder), "ids": ids}
    told = ask(reader, server, job, decoded.parent / "log", verbose)
    limit = reader.rounded if re.search(reader.rounds, name) else reader.exact
    means = re.findall(r'^\{"mean": (.*)\}$', told, re.MULTILINE)
    if means:
        return Found(name, float(means[-1]), ours, limit=limit)
    said = last_error(told)
    if re.search(reader.refuses, name):
        return Found(name, None, ours, said, REFUSED)
    if re.search(reader.no_kernel, said, re.IGNORECASE):
        return Found(name, None, ours, said, NO_KERNEL)
    return Found(name, None, ours, said)


def ask(reader: Reader, server: Server, job: Mapping[str, Any], log: Path, verbose: bool) -> str:
    """Have the reader's process do something; all that it said."""
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps({**job, "log": str(log)}), file=server.stdin, flush=True)
    while (line := server.stdout.readline()).strip() != DONE:
        if not line:
            sys.exit(f"{reader.name} cannot be imported")
    told = log.read_text(errors="replace")
    if verbose:
        print(told)
    return told


def last_error(text: str) -> str:
    """The last exception's own words, in a line."""
    lines = [
        re.sub(r"^(\(.*?pid=\d+\) )?(\[rank\d+\]: ?)?", "", line) for line in text.splitlines()
    ]
    found = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b.*: ", line)]
    said = "it ended without a word"
    if found:
        rest = lines[found[-1] :]
        said = " ".join(rest[: rest.index("") if "" in rest else len(rest)])
    said = re.sub(r"\s+", " ", said).replace("|", "/").replace(str(ROOT), "")
    said = re.sub(r"^pydantic\S+ValidationError: .*? Value error, ", "", said)
    said = re.sub(r" \[type=value_error.*", "", said)
    return said if len(said) < SHOWN else said[: SHOWN - 3] + "..."


def by_transformers(folder: Path) -> tuple[list[int], float]:
    """The text's tokens and their mean log-probability, in float32."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT.read_text(encoding="utf-8")[: 20 * TOKENS])["input_ids"][:TOKENS]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    each = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return ids, float(each.mean())


def put(page: Path, reader: Reader, results: Sequence[Found]) -> None:
    """Put the lines into the part of the page between the check's marks, in place of older ones."""
    mark, end = f"<!-- check-{reader.name} -->\n", "<!-- end -->\n"
    before, start, rest = page.read_text(encoding="utf-8").partition(mark)
    if not start:
        sys.exit(f"{page} has no line {mark!r}")
    older, _, after = rest.partition(end)
    lines = {line.split("|")[1].strip(): line for line in older.splitlines()[3:] if "|" in line}
    lines |= {found.name: "| " + " | ".join(found.cells) + " |" for found in results}
    heads = ["folder", reader.packages[0].replace("==", " "), "mean log-probability", "decoded"]
    order = [*reader.made, *reader.plain, *reader.experts]
    rows = ["", "| " + " | ".join(heads) + " |", "|---|---|--:|--:|"]
    rows += [lines[name] for name in order if name in lines]
    page.write_text(before + mark + "\n".join([*rows, "", end]) + after, encoding="utf-8")
