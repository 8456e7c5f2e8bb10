"""Many outputs from one read: each is what it would be alone, and a stop keeps what is whole."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantcli
from quantcli.artifacts import atomic, slabs, write
from quantcli.cli.app import run
from quantcli.errors import OutputError, PlanError, UsageError
from quantcli.formats import native
from quantcli.plan.filetypes import file_types
from quantcli.plan.output_set import SETS
from quantcli.plan.recipe import Recipe
from quantcli.sources.files import StoredFile

Call = Callable[..., tuple[int, str, str]]
TYPES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q8_0", "BF16")


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Call:
    monkeypatch.chdir(tmp_path)

    def quantize(*args: object) -> tuple[int, str, str]:
        code = run(["quantize", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return quantize


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_each_file_is_that_of_a_run_of_its_own(mini: Path, call: Call) -> None:
    code, out, err = call(mini, "--type", ",".join(TYPES[:3]), "--type", *TYPES[3:4],
                          "--type", ",".join(TYPES[4:]), "-o", "set/")  # fmt: skip
    names = [f"bookworm-mini-{name}.gguf" for name in TYPES]
    assert (code, out) == (0, "".join(f"set/{name}\n" for name in names))
    assert f"{len(TYPES)} of {len(TYPES)} outputs made" in err.splitlines()[-1]
    for name in TYPES:
        quantcli.quantize(mini, "alone/", type=name, threads=1)
    assert files(Path("set")) == files(Path("alone"))
    assert sorted(files(Path("set"))) == sorted(names)


def test_what_files_share_is_encoded_once(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []

    def count(fmt, rows, *args, **more):
        encoded.append(fmt.name)
        return encode(fmt, rows, *args, **more)

    encode = native.encode
    monkeypatch.setattr(native, "encode", count)
    kinds = ["Q4_K_S", "Q4_K_M"]
    made = quantcli.quantize(mini, tmp_path / "set", type=kinds)
    # A dry run encodes too, to tell how long it takes.
    done = Counter(encoded)
    plans = [quantcli.quantize(mini, type=kind, dry_run=True).document for kind in kinds]
    tensors = [tensor for plan in plans for tensor in plan["tensors"]]
    wanted = {(tensor["name"], tensor["type"]) for tensor in tensors}
    # Each tensor is one slab.
    assert done == Counter(kind for _, kind in wanted)
    assert done.total() < len(tensors)
    assert made.nbytes == sum(path.stat().st_size for path in made.paths)
    assert [output.paths[0] for output in made.outputs] == list(made.paths)


def test_layouts_beside_types(mini: Path, call: Call) -> None:
    args = "--to", "gptq,AWQ,gguf,hf", "--type", "Q4_0,Q8_0", "--bits", "4"
    code, out, _ = call(mini, *args, "-o", "set", "-q")
    assert code == 0
    stem = "set/bookworm-mini-"
    ends = ("gptq-4bit", "awq-4bit", "Q4_0.gguf", "Q8_0.gguf", "hf-Q4_0", "hf-Q8_0")
    assert out == "".join(f"{stem}{end}\n" for end in ends)
    for to, kinds in (("gptq", [None]), ("awq", [None]), ("gguf", TWO), ("hf", TWO)):
        for kind in kinds:
            own = {"type": kind} if kind else {"bits": 4}
            quantcli.quantize(mini, "alone/", to=to, **own)
    assert files(Path("set")) == files(Path("alone"))


TWO = ("Q4_0", "Q8_0")


@pytest.mark.parametrize("threads", [1, 3])
def test_outputs_of_any_kind_share_one_read(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """In slabs so short that GGUFs and folders cut the same tensors in different places."""
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1 << 15)
    counted = Counter()

    def fill(self: StoredFile, target: np.ndarray, offset: int) -> None:
        counted[self.path.name] += target.nbytes
        read(self, target, offset)

    read = StoredFile.fill
    monkeypatch.setattr(StoredFile, "fill", fill)
    asked = {"to": ["gguf", "gptq", "hf", "mlx"], "type": ["Q4_K_M", "Q8_0"], "bits": 4}
    quantcli.quantize(mini, tmp_path / "set/", threads=threads, **asked)
    # Each byte of the file, its header included.
    assert counted == {"model.safetensors": (mini / "model.safetensors").stat().st_size}
    for to, kinds in (("gguf", asked["type"]), ("hf", asked["type"]), ("gptq", [None]),
                      ("mlx", [None])):  # fmt: skip
        for kind in kinds:
            own = {"type": kind} if kind else {"bits": 4}
            quantcli.quantize(mini, f"{tmp_path}/alone/", to=to, threads=threads, **own)
    assert files(tmp_path / "set") == files(tmp_path / "alone")


def test_rows_in_one_order_are_hashed_once(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []

    def count(rows: np.ndarray) -> bytes:
        hashed.append(rows.nbytes)
        return digest(rows)

    digest = slabs.hash_rows
    monkeypatch.setattr(write, "hash_rows", count)
    quantcli.quantize(mini, tmp_path, to=["gguf", "gptq", "hf"], type="Q8_0", bits=4)
    tensors = load_file(mini / "model.safetensors")
    # A GGUF of this family has the rows of q and k in an order of its own.
    turned = [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight"))]
    assert sum(hashed) == sum(tensors[name].nbytes for name in [*tensors, *turned])


def test_what_one_read_holds_counts_as_memory(mini: Path) -> None:
    def plan(**more: object) -> dict[str, Any]:
        asked = {"type": "Q8_0", "bits": 4, "threads": 2, "dry_run": True} | more
        return quantcli.quantize(mini, **asked).document

    alone, both = plan(to="gptq", type=None), plan(to=["gguf", "gptq"])
    held = both["peak_memory_bytes"] - alone["peak_memory_bytes"]
    # Six slabs for two threads; the largest tensor is smaller than one.
    assert held == 6 * 4096 * 256 * 2
    with pytest.raises(PlanError, match="for these outputs even on one thread"):
        plan(to=["gguf", "gptq"], max_memory="220M")
    assert plan(to="gptq", type=None, max_memory="220M")["threads"] == 1


def test_a_head_like_the_embedding_is_left_out_of_a_gguf_alone(mini: Path, call: Call) -> None:
    """What a GGUF leaves out, a folder of the same run keeps."""
    shutil.copytree(mini, "tied")
    tensors = load_file("tied/model.safetensors")
    head = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": head}, "tied/model.safetensors", {"format": "pt"})
    assert call("tied", "--to", "gguf,hf", "--type", "Q8_0", "-o", "set/", "-q")[0] == 0
    for to in ("gguf", "hf"):
        assert call("tied", "--to", to, "--type", "Q8_0", "-o", "alone/", "-q")[0] == 0
    assert files(Path("set")) == files(Path("alone"))
    kept = load_file("set/tied-hf-Q8_0/model.safetensors")
    assert np.array_equal(kept["lm_head.weight"], kept["model.embed_tokens.weight"])


def test_a_recipe_of_several_outputs(mini: Path, call: Call) -> None:
    Path("set.toml").write_text(
        'chat_template = "chat.jinja"\n[[outputs]]\ntype = ["Q4_0", "Q5_0"]\n[[outputs]]\n'
        'name = "pure.gguf"\ntype = "Q4_0"\npure = true\n[[outputs]]\nto = "mlx"\nbits = [4, 8]\n'
    )
    Path("chat.jinja").write_text("{{ messages }}")
    code, out, _ = call(mini, "--recipe", "set.toml", "-o", "set/", "-q")
    names = ["bookworm-mini-Q4_0.gguf", "bookworm-mini-Q5_0.gguf", "pure.gguf",
             "bookworm-mini-mlx-4bit", "bookworm-mini-mlx-8bit"]  # fmt: skip
    assert (code, out.split()) == (0, [f"set/{name}" for name in names])
    common = {"chat_template": "chat.jinja"}
    alone = quantcli.quantize(mini, "p.gguf", type="Q4_0", pure=True, **common).paths[0]
    assert alone.read_bytes() == Path("set/pure.gguf").read_bytes()
    folder = quantcli.quantize(mini, "m", to="mlx", bits=8, **common).paths[0]
    assert files(folder) == files(Path("set/bookworm-mini-mlx-8bit"))
    code, printed, _ = call(mini, "--recipe", "set.toml", "--print-recipe")
    assert code == 0
    Path("again.toml").write_text(printed)
    assert call(mini, "--recipe", "again.toml", "--print-recipe")[1] == printed
    again = quantcli.quantize(mini, "again/", recipe="again.toml")
    assert [path.name for path in again.paths] == names
    assert files(Path("again")) == files(Path("set"))


def test_recipes_from_python(mini: Path, tmp_path: Path) -> None:
    recipes = [Recipe(type="Q4_0"), Recipe(to="gptq", bits=4)]
    made = quantcli.quantize(mini, tmp_path / "set", recipe=recipes, dtype="BF16", dry_run=True)
    assert [output.document["type"] for output in made.outputs] == ["Q4_0", "int4 g128"]
    with pytest.raises(UsageError, match="no output is asked for"):
        quantcli.quantize(mini, recipe=[])


def test_sets_hold_types_that_there_are() -> None:
    known = {each.name: each for each in file_types()}
    assert all(name in known for names in SETS.values() for name in names)
    assert set(SETS["popular"]) | set(SETS["small"]) <= set(SETS["all"])
    special = {"MXFP4_MOE", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"}
    everything = {name for name, each in known.items() if not each.is_float}
    assert set(SETS["all"]) == everything - special
    for names in SETS.values():
        assert list(names) == [name for name in known if name in names]


def test_the_dry_run_is_a_table(mini: Path, call: Call) -> None:
    code, out, err = call(mini, "--set", "popular", "--type", "BF16", "--dry-run", "-o", "new/")
    assert code == 0
    assert "IQ3_XXS, IQ2_M of the set are left out, since they need an importance matrix" in err
    lines = out.splitlines()
    rows = [line.split()[0] for line in lines[1 : lines.index("")]]
    assert rows == ["BF16", *(n for n in SETS["popular"] if n not in ("IQ3_XXS", "IQ2_M"))]
    code, out, _ = call(mini, "--set", "popular", "--type", "BF16", "--json", "--dry-run")
    plan = json.loads(out)
    assert plan["schema"] == "quantcli.plan/1"
    made = quantcli.quantize(mini, "new/", output_set="popular", type="BF16")
    sizes = [path.stat().st_size for path in made.paths]
    assert [each["bytes"] for each in plan["outputs"]] == sizes
    assert plan["bytes"] == plan["bytes_to_write"] == sum(sizes) == made.nbytes
    shown = next(line for line in lines if line.startswith("Q4_K_S "))
    assert f"{plan['outputs'][rows.index('Q4_K_S')]['bits_per_weight']:.2f}" in shown
    assert f"({sum(sizes):,} bytes)" in "\n".join(lines)


def test_one_document_for_all(mini: Path, call: Call) -> None:
    code, out, _ = call(mini, "--type", "Q4_0,Q8_0", "--json", "-o", "set/")
    document = json.loads(out)
    assert code == 0
    assert document["schema"] == "quantcli.quantize/1"
    assert document["paths"] == ["set/bookworm-mini-Q4_0.gguf", "set/bookworm-mini-Q8_0.gguf"]
    assert [each["type"] for each in document["outputs"]] == ["Q4_0", "Q8_0"]
    assert document["bytes"] == sum(Path(path).stat().st_size for path in document["paths"])


def test_one_output_into_a_folder(mini: Path, call: Call) -> None:
    Path("there").mkdir()
    assert call(mini, "--type", "q4_k", "-o", "there", "-q")[1] == (
        "there/bookworm-mini-Q4_K_M.gguf\n"
    )
    assert call(mini, "--bits", "8", "-o", "new/", "-q")[1] == "new/bookworm-mini-Q8_0.gguf\n"
    assert call(mini, "--to", "gptq", "-o", "new/", "-q")[1] == "new/bookworm-mini-gptq-4bit\n"
    assert call(mini, "--to", "gptq", "-o", "named", "-q")[1] == "named\n"
    # As a shell completes it: the folder itself is meant.
    assert call(mini, "--to", "gptq", "-o", "named/", "--force", "-q")[1] == "named\n"


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["--type", "Q4_0,IQ2_XXS,IQ1_S"], "IQ2_XXS and IQ1_S need an importance matrix",
         "--calibrate TEXT or --imatrix FILE"),
        (["--type", "Q4_0,q4_0"], "--type Q4_0 is given twice", "leave one out"),
        (["--bits", "4,4"], "--bits 4 is given twice", "leave one out"),
        (["--bits", "4,x"], "--bits x is not a number", "--bits 2,4"),
        (["--bits", "4,7"], "there is no type of 7 bits", "2, 3, 4"),
        (["--type", "Q4_0,"], "--type has an empty entry", "one comma"),
        (["--type", "Q4_0,Q4_KM"], "there is no type Q4_KM", "did you mean"),
        (["--set", "populr"], "there is no set named 'populr'", "did you mean popular?"),
        (["--set", "most"], "there is no set named 'most'", "popular, small, all"),
        (["--type", "Q4_0,Q8_0", "-o", "x.gguf"], "-o x.gguf names one file, and 2 outputs are",
         "-o FOLDER/"),
        (["--to", "gptq,gptq"], "--to gptq is given twice", "leave one out"),
        (["--to", "gptq,awq", "--type", "Q4_0"], "--type is not for --to gptq", "gguf"),
        (["--to", "gptq,awq", "--bits", "4,8"], "--to awq has no 8-bit weights", "4"),
        (["--recipe", "two.toml", "--type", "Q8_0"], "a recipe of 2 outputs exclude each other",
         "leave one"),
        (["--recipe", "same.toml"], "two outputs are called bookworm-mini-Q4_0.gguf", "name ="),
        (["--recipe", "name.toml"], "name 'a/b' is no file name", "-o names the folder"),
        (["--recipe", "outputs.toml"], "outputs is no list of tables", "[[outputs]]"),
    ],
)  # fmt: skip
def test_refusals(mini: Path, call: Call, args: list[str], message: str, hint: str) -> None:
    recipes = {
        "two.toml": 'type = ["Q4_0", "Q5_0"]',
        "same.toml": '[[outputs]]\ntype = "Q4_0"\n[[outputs]]\ntype = "Q4_0"\npure = true',
        "name.toml": '[[outputs]]\ntype = "Q4_0"\nname = "a/b"',
        "outputs.toml": 'outputs = "Q4_0"',
    }
    for name, text in recipes.items():
        Path(name).write_text(text)
    code, out, err = call(mini, *args)
    assert (code, out) == (2, "")
    error, advice = err.splitlines()[-2:]
    assert message in error
    assert hint in advice
    assert {path.name for path in Path().iterdir()} == set(recipes)


def test_what_a_model_cannot_be_is_said_before_and_leaves_no_folder(mini: Path, call: Call) -> None:
    Path("m.gguf").write_bytes(b"")
    code, _, err = call(mini, "--type", "Q4_0,Q8_0", "--override-kv", "general.alignment=int:3",
                        "-o", "new/")  # fmt: skip
    assert code != 0
    assert not Path("new").exists()
    code, _, err = call(mini, "--type", "Q4_0,Q8_0", "-o", "a/b/")
    assert code == 1
    assert "the folder" in err


def test_too_small_a_disk_for_all_together(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantcli.plan.budget.free_disk", lambda path: 6_000_000)
    monkeypatch.setattr("quantcli.run.check_needs.free_disk", lambda path: 6_000_000)
    quantcli.quantize(mini, tmp_path / "one/", type="Q8_0")
    said = r"7,4.* bytes of output needed, 6,000,000 bytes free"
    with pytest.raises(OutputError, match=said):
        quantcli.quantize(mini, tmp_path / "two/", type=["Q8_0", "Q4_K_M"])
    assert not (tmp_path / "two").exists()
    plan = quantcli.quantize(mini, tmp_path / "two/", type=["Q8_0", "Q4_K_M"], dry_run=True)
    assert plan.document["bytes_to_write"] > 6_000_000


LIMITED = """
import resource, sys
from quantcli.artifacts import atomic, slabs, write
# A disk that cannot set space aside, so that it is full in the middle.
atomic.reserve = lambda descriptor, size: False
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
from quantcli.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


def test_a_full_disk_keeps_the_whole_files(mini: Path, call: Call) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    args = ["quantize", str(mini), "--type", "Q8_0,Q4_0,Q2_K", "-o", "set/"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout.split() == [f"set/bookworm-mini-{kind}.gguf" for kind in ("Q4_0", "Q2_K")]
    assert "set/bookworm-mini-Q8_0.gguf: File too large; the other outputs go on" in done.stderr
    error, hint = done.stderr.splitlines()[-2:]
    assert error.endswith(
        "File too large; 2 of 3 outputs are whole "
        "(bookworm-mini-Q4_0.gguf, bookworm-mini-Q2_K.gguf)"
    )
    assert "--resume makes the rest" in hint
    assert len(list(Path("set").iterdir())) == 3, "two files and the journal"
    code, _, err = call(*args[1:], "--resume")
    assert code == 0
    assert "2 of 3 outputs are whole already" in err
    for kind in ("Q8_0", "Q4_0", "Q2_K"):
        quantcli.quantize(mini, "alone/", type=kind)
    assert files(Path("set")) == files(Path("alone"))


def test_where_none_can_be_written_the_first_is_said(mini: Path, call: Call) -> None:
    script = LIMITED.replace("3_000_000", "1_000_000")
    args = ["quantize", str(mini), "--type", "Q8_0,Q4_0", "-o", "set/"]
    done = subprocess.run(
        [sys.executable, "-c", script, *args], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: set/bookworm-mini-Q")
    assert "ulimit -f" in hint
    assert not Path("set").exists()


KILLED = """
import os, signal, sys
from quantcli.artifacts.atomic import AtomicFiles
count, publish = 0, AtomicFiles.publish
def killed(self):
    global count
    count += 1
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
    publish(self)
number = int(sys.argv[1])
AtomicFiles.publish = killed
from quantcli.cli.app import run
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", ["5", "6"], ids=["before it is noted", "after it is noted"])
def test_a_killed_set_goes_on(mini: Path, call: Call, number: str) -> None:
    """Killed at the third file: before each file is named, the journal is written."""
    args = ["quantize", str(mini), "--type", "Q2_K,Q3_K_M,Q4_K_M,Q8_0", "-o", "set/"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, number, *args], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    whole = {name: Path("set", name).stat().st_mtime_ns for name in
             ("bookworm-mini-Q2_K.gguf", "bookworm-mini-Q3_K_M.gguf")}  # fmt: skip
    assert {p.name for p in Path("set").iterdir() if not p.name.startswith(".")} == set(whole)
    code, _, err = call(*args[1:])
    assert code == 1
    assert "bookworm-mini-Q2_K.gguf exists already" in err
    assert "--resume makes what is left" in err
    code, _, err = call(mini, "--type", "Q2_K,Q3_K_M,Q4_K_M,Q8_0", "-o", "set/", "--pure",
                        "--resume")  # fmt: skip
    assert code == 1
    assert "is of a set with another model, text or other options" in err
    plan = call(*args[1:], "--resume", "--dry-run")[1]
    assert plan.count("whole already") == 2
    code, out, err = call(*args[1:], "--resume")
    assert code == 0
    assert len(out.split()) == 4
    assert "2 of 4 outputs made" in err.splitlines()[-1]
    assert {name: Path("set", name).stat().st_mtime_ns for name in whole} == whole
    for kind in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q8_0"):
        quantcli.quantize(mini, "alone/", type=kind)
    assert files(Path("set")) == files(Path("alone"))


KILLED_INSIDE = """
import os, signal, sys
from quantcli.artifacts.atomic import AtomicFiles
from quantcli.artifacts import slabs
slabs.SLAB_BYTES = 1 << 17
count, write = 0, AtomicFiles.write
def killed(self, path, offset, data):
    global count
    count += 1
    if count == number:
        # In the middle of a slab.
        write(self, path, offset, bytes(data)[:len(bytes(data)) // 2])
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    write(self, path, offset, data)
number = int(sys.argv[1])
AtomicFiles.write = killed
from quantcli.cli.app import run
sys.exit(run(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("how", "damaged"), [("SIGKILL", False), ("SIGINT", True)], ids=["", "damaged"]
)
def test_a_set_killed_within_its_files_goes_on_there(
    mini: Path, call: Call, monkeypatch: pytest.MonkeyPatch, how: str, damaged: bool
) -> None:
    """None was whole: what was written of each stays, and is made anew where it is damaged."""
    args = ["quantize", str(mini), "--to", "gguf,gptq", "--type", "Q4_K_M,Q8_0", "--bits", "4",
            "-o", "set/", "-t", "2"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", KILLED_INSIDE, "160", how, *args], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == (-signal.SIGKILL if how == "SIGKILL" else 130)
    if how == "SIGINT":
        assert "0 of 3 outputs are whole; the same command with --resume makes the rest" in (
            done.stderr
        )
    assert all(path.name.endswith(".partial") for path in Path("set").iterdir())
    if damaged:
        for file in Path("set").rglob("kept-*"):
            if file.suffix != ".log" and file.is_file():
                content = bytearray(file.read_bytes())
                content[len(content) // 8] ^= 1
                file.write_bytes(content)
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1 << 17)
    made = Counter()

    def count(self: write.Writing, file: object, offset: int, data: Any) -> None:
        made[self.artifact.paths[0].name] += memoryview(data).nbytes
        original(self, file, offset, data)

    original = write.Writing.write
    monkeypatch.setattr(write.Writing, "write", count)
    code, _, err = call(*args[1:], "--resume")
    assert code == 0
    assert "slabs are there already" in err
    whole = files(Path("set"))
    for name, nbytes in made.items():
        # The header, and what lies behind the kill.
        assert nbytes < 0.8 * sum(len(body) for path, body in whole.items() if name in path)
    for own in ({"to": "gguf", "type": "Q4_K_M"}, {"to": "gguf", "type": "Q8_0"},
                {"to": "gptq", "bits": 4}):  # fmt: skip
        quantcli.quantize(mini, "alone/", **own)
    assert whole == files(Path("alone"))


def test_what_another_set_left_is_cleared_away(mini: Path, call: Call) -> None:
    args = ["quantize", str(mini), "--type", "Q4_K_M,Q8_0", "-o", "set/"]
    for more in (["--resume", "--pure"], []):
        subprocess.run(
            [sys.executable, "-c", KILLED_INSIDE, "60", "SIGKILL", *args], capture_output=True,
            check=False,
        )  # fmt: skip
        assert list(Path("set").rglob("kept-*.log"))
        code, _, err = call(*args[1:], *more)
        assert code == 0
        assert "already" not in err
        assert [path.suffix for path in Path("set").iterdir()] == [".gguf", ".gguf"]
        shutil.rmtree("set")


def test_a_whole_file_that_was_changed_is_not_kept(mini: Path, call: Call) -> None:
    args = ["quantize", str(mini), "--type", "Q2_K,Q3_K_M,Q8_0", "-o", "set/"]
    subprocess.run([sys.executable, "-c", KILLED, "5", *args], capture_output=True, check=False)
    Path("set/bookworm-mini-Q2_K.gguf").write_bytes(b"other")
    code, _, err = call(*args[1:], "--resume")
    assert code == 1
    assert "bookworm-mini-Q2_K.gguf exists already" in err
    assert call(*args[1:], "--force", "-q")[0] == 0
    assert len(list(Path("set").iterdir())) == 3


def test_a_stopped_set_says_how_to_go_on(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, publish = 0, atomic.AtomicFiles.publish

    def interrupted(self: atomic.AtomicFiles) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        publish(self)

    monkeypatch.setattr(atomic.AtomicFiles, "publish", interrupted)
    events = []
    with pytest.raises(KeyboardInterrupt):
        quantcli.quantize(mini, tmp_path / "set", type=["Q4_0", "Q8_0"], on_event=events.append)
    assert events[-1].message == (
        "1 of 2 outputs are whole (bookworm-mini-Q4_0.gguf); the same command with --resume makes "
        "the rest"
    )


def test_resume_is_for_a_set(mini: Path) -> None:
    with pytest.raises(UsageError, match="--resume belongs to a method"):
        quantcli.quantize(mini, type=["Q4_0"], resume=True)
