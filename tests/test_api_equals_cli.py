"""What the command line can say, Python can, and both do the same.

Each line below is run as a command and, with what click makes of its options, as a call. Both must
give the same document, the same files, the same notes and the same refusals. The options come from
the commands themselves, so one that no line has, or that is no keyword, fails.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from support.frozen_inputs import write_input
from support.tiny_towers import build as build_tower

import quantcli
from quantcli.cli.app import app, run
from quantcli.errors import GateError, QuantcliError, UsageError
from quantcli.plan.recipe import FIELDS

pytest.importorskip("torch")
pytest.importorskip("transformers")

TEXT = Path(__file__).parent / "golden" / "calibration.txt"
CALLS: dict[str, Callable[..., Any]] = {
    "quantize": quantcli.quantize,
    "calibrate": quantcli.calibrate,
    "eval-ppl": quantcli.evaluate,
    "export": quantcli.export,
}
SHOWS = {"json", "quiet", "verbose", "debug", "print_recipe", "help", "words", "prompt"}
"""Options that only shape what is printed."""
NAMES = {
    "quantize": {"model": "source"},
    "calibrate": {"model": "source"},
    "eval-ppl": {"artifacts": "models"},
    "export": {"artifacts": "artifact"},
}
"""Arguments whose keyword is called otherwise."""

PLANS = """
--bits 3
--type Q5_K_M --tensor-type ffn_up=Q8_0 --tensor-type nosuch=Q8_0 --output-tensor-type F16
--token-embedding-type Q4_0 --leave-output-tensor --threads 1
--pure --imatrix m.gguf --include-weights attn
--imatrix m.gguf --exclude-weights attn --allow-requantize
--override-kv general.name=str:x --on-fallback error --split-max-size 1M --pre llama-bpe
--keep first,last=Q8_0 -o other.gguf --recipe recipe.toml
--to mlx --bits 8 --group-size 32 --range minmax --dtype f32
--to GPTQ --asymmetric --keep k_proj
--to gptq --strict --keep o_proj --on-fallback nearest
--bits 4 --push org/name --public
--bits 4 --report page
--to compressed-tensors --activations int8
--to compressed-tensors --scheme mlp=NVFP4A16 --scheme FP8_DYNAMIC
--to compressed-tensors --scheme UNQUANTIZED --kv-cache fp8
--method gptq --damping 0.1 --column-order activation --sweeps 2 --fisher-windows 3 --propagate
--method awq,gptq --random-share 0.5 --calibrate text.txt --chunks 2 --resume --to awq
--method gptq --sample-share 0.2 --calibrate text.txt
--method tune --tune-steps 3 --tune e2e --e2e-steps 2
--method best --target-size 3M
--method gptq --allocate
--method gptq --target-bpw 4 --allocate-from q4_k,q6_k
--imatrix m.gguf --allocate
--to compressed-tensors --imatrix m.gguf --allocate --allocate-from W3A16,keep
--quality high
--max-memory 300M --max-scratch 1G --scratch . --no-mtp --download --shard 1/2
--fit 2G --on mac --ctx 4k --kv-type q8_0
--set popular --type BF16 -o set/
--to gptq,mlx --bits 4,8
--type Q4_0,Q8_0 --method gptq --to gguf
"""
RUNS = """
quantize mini --type Q4_0 --pure -o out.gguf
quantize mini --type IQ4_NL -o full.gguf --force
quantize mini --to gptq --split-max-size 3M
quantize mini --type Q4_0 --type Q8_0 -o set/
quantize mini --to gguf,mlx --type q4_k --bits 4 -o set
quantize seeing --type Q8_0 --mmproj --mmproj-type F32 -o out.gguf
quantize seeing --mmproj-only
quantize seeing --type Q8_0 --ignore-tensor vi --chat-template text.txt -o out.gguf
quantize small --bits 4 --calibrate text.txt --chunks 1 -o out.gguf
quantize mini --to compressed-tensors --activations int8:static --statistics seen.safetensors
quantize mini --type Q4_0 --correct-bias --calibrate text.txt
quantize mini --to compressed-tensors --scheme NVFP4 --kv-cache fp8 --calibrate text.txt --chunks 2
quantize small --type Q4_0 --method gptq --calibrate text.txt --chunks 2 --threads 1 --device cpu \
-o out.gguf
calibrate mini --data text.txt --ctx 32 --chunks 2 --seed 1 --collect abs_max,mean_abs --threads 1
calibrate mini --data lines.jsonl --field body --ctx 32 --chunks 2 --dtype float32 --device cpu \
--max-memory 1G --pre llama-bpe --resume --legacy --download -o m.dat
calibrate mini --data text.txt --ctx 32 --chunks 1 --stats --force -o full.gguf
calibrate mini --data text.txt --ctx 32 --chunks 2 --scratch . --max-scratch 1G --dry-run
calibrate --merge m.gguf --merge m.gguf
calibrate m.gguf --stats
eval-ppl mini --data lines.jsonl --field body --ctx 32 --chunks 2 --stride 16 --engine torch \
--device cpu
eval-ppl q4.gguf --data text.txt --ctx 32 --chunks 2 --engine torch --config mini --reference mini \
--save-base base.kld --top-k 8 --max-kld 9 --max-kld99 9 --max-ppl-ratio 9 --min-top1 0 \
--max-kld999 9 --max-rms-dp 9 --plot p.svg --report page --threads 1
eval-ppl mini --data text.txt --base base.dat --chunks 1 --engine torch --plot full.gguf --force
eval-ppl mini --data text.txt --ctx 32 --chunks 2 --engine torch --max-ppl 1
eval-ppl q4.gguf --data text.txt --ctx 32 --chunks 2 --engine torch --config mini --reference mini \
--max-kld99 1e-9 --max-kld999 1e-9
eval-ppl q4.gguf --speed --threads 1 --download --max-bpw 9 --max-memory 4G --min-speed 0 \
--min-prompt-speed 0
eval-ppl q4.gguf --data text.txt --ctx 32 --chunks 2 --reference q4.gguf --greedy 4 --min-greedy 0 \
--floor
export q4.gguf --to gguf --split-max-size 1M --card -o s.gguf
export q4.gguf --to hf --dtype bf16 --config mini --tokenizer mini -o folder --dry-run
export q4.gguf --to gptq --requantize --threads 1 --download
export q4.gguf --to card --eval eval.json -o full.gguf --force
export q4.gguf --verify --against mini
export q4.gguf --to report --eval eval.json --against mini -o report
export q4.gguf mini --to hub --repo org/name --public --dry-run
"""
REFUSALS = """
quantize mini --bits 7
quantize mini --bits 4 --shard 3/2
quantize mini --bits 4 --type Q4_0
quantize mini --quality better
quantize mini --method gtpq
quantize mini --type Q4_0 --device cuda
quantize mini --method gptq --device cuda:9x
quantize mini --damping 0.1
quantize mini --resume
quantize mini --chunks 3
quantize mini --calibrate text.txt --imatrix m.gguf
quantize mini --calibrate text.txt --dry-run
quantize mini --calibrate text.txt -o full.gguf
quantize mini --method awq --resume
quantize mini --to awq --tensor-type a=Q4_0
quantize mini --max-memory 1K
quantize mini --bits 4 --scratch nowhere
quantize mini --type Q4_0 -o full.gguf
quantize mini --type IQ2_XXS
quantize q4.gguf --type Q8_0
quantize nowhere
quantize mini --fit 2G --bits 4
quantize mini --fit 1M
quantize mini --ctx 4k
quantize q4.gguf --fit 2G
quantize mini --mmproj
quantize mini --to mlx --mmproj
quantize mini --to compressed-tensors --scheme FP9
quantize mini --to compressed-tensors --scheme FP8
quantize mini --to compressed-tensors --scheme FP8 --statistics nowhere
quantize mini --type Q4_0,IQ2_XXS
quantize mini --type Q4_0,q4_0
quantize mini --type Q4_0,Q8_0 -o a.gguf
quantize mini --set nothing
quantize mini --bits 4,,8
calibrate
calibrate mini --merge m.gguf
calibrate mini --ctx 4
calibrate mini --collect nothing
eval-ppl mini
eval-ppl mini --data text.txt --plot p.svg
eval-ppl mini --data text.txt --device gpu
eval-ppl mini --data text.txt --max-ppl-ratio 1.1
eval-ppl mini --data text.txt --greedy 8
eval-ppl mini --tasks arc_easy --task-limit 2 --min-task arc_easy
eval-ppl mini --data text.txt --min-task arc_easy=1
eval-ppl q4.gguf --data text.txt --floor
eval-ppl q4.gguf --data text.txt --min-speed 1
eval-ppl mini --data text.txt --reference mini --base base.dat
export q4.gguf
export q4.gguf --against mini
export q4.gguf --verify --to hf
export q4.gguf --to hub
export q4.gguf --to hub --repo name
export q4.gguf --to hf --repo org/name
export q4.gguf --to report --public
export q4.gguf --to card --dtype f16
export q4.gguf --to nothing
"""


def _lines(text: str, prefix: str = "") -> list[str]:
    return [prefix + line for line in text.replace("\\\n", "").strip().splitlines()]


PLANNED = _lines(PLANS, "quantize mini --dry-run ")


@cache
def _commands() -> dict[str, Any]:
    group = typer.main.get_command(app)
    return {name: group.commands[name] for name in CALLS}  # type: ignore[attr-defined]


def _call(line: str) -> tuple[str, dict[str, Any]]:
    """The command of a line, and the keywords that click's reading of it stands for."""
    name, *words = shlex.split(line)
    context = _commands()[name].make_context(name, words)
    given = {
        NAMES[name].get(key, key): value
        for key, value in context.params.items()
        if context.get_parameter_source(key).name == "COMMANDLINE"
    }
    return name, given


@pytest.fixture(scope="module")
def inputs(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the lines name."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "mini").symlink_to(mini)
    write_input("small", folder)
    build_tower("gemma3", folder / "seeing")
    text = TEXT.read_text()
    (folder / "text.txt").write_text(text)
    (folder / "lines.jsonl").write_text(json.dumps({"body": text[:4000]}) + "\n")
    (folder / "recipe.toml").write_text('type = "Q6_K"\npure = true\n')
    (folder / "full.gguf").write_bytes(b"something else")
    quantcli.quantize(mini, folder / "q4.gguf", type="Q4_0")
    made = quantcli.calibrate(
        mini,
        [folder / "text.txt"],
        output=folder / "made.calib.gguf",
        ctx=32,
        chunks=4,
        collect="min_max",
    )
    for path, name in zip(made.paths, ("m.gguf", "seen.safetensors"), strict=True):
        path.rename(folder / name)
    results = quantcli.evaluate(
        folder / "mini", folder / "text.txt", ctx=32, chunks=2, engine="torch",
        save_base=folder / "base.dat",
    )  # fmt: skip
    body = {"schema": "quantcli.eval-ppl/1", **results.document}
    (folder / "eval.json").write_text(json.dumps(body))
    return folder


@pytest.fixture
def place(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """``place(name)``: go to a fresh folder with the inputs."""

    def go(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for source in inputs.iterdir():
            target = folder / source.name
            if source.name == "full.gguf":
                target.write_bytes(source.read_bytes())
            else:
                target.symlink_to(source)
        monkeypatch.chdir(folder)
        return folder

    return go


def _made(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _without_chance(document: dict[str, Any]) -> dict[str, Any]:
    left = json.loads(json.dumps(document))
    for part in (left, *left.get("outputs", ())):
        for key in (
            "schema",
            "free_disk_bytes",
            "peak_memory_bytes",
            "estimated_seconds",
            "speeds",
        ):
            part.pop(key, None)
    for gate in left.get("gates", ()):
        if gate["text"] is None:
            gate.pop("value")  # of a speed or a memory
    return left


@pytest.mark.parametrize("name", CALLS)
def test_every_option_is_a_keyword_and_has_a_line(name: str) -> None:
    options = {each.name for each in _commands()[name].params} - SHOWS
    # lm-eval, which --tasks runs, is not part of the tests' environment.
    refused = [line for line in _lines(REFUSALS) if "--tasks" in line]
    lines = [line for line in [*PLANNED, *_lines(RUNS), *refused] if line.startswith(name)]
    assert options - {key for line in lines for key in _keys(line)} == set()


def _keys(line: str) -> set[str]:
    name, given = _call(line)
    back = {new: old for old, new in NAMES[name].items()}
    return {back.get(key, key) for key in given}


@pytest.mark.parametrize("line", [*PLANNED, *_lines(RUNS)])
def test_both_do_the_same(
    line: str, place: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place("cli")
    name, keywords = _call(line)
    code = run([*shlex.split(line), "--json"])
    shown, said = capsys.readouterr()
    made = _made(folder)
    folder = place("api")
    events: list[Any] = []
    if code:
        with pytest.raises(GateError) as caught:
            CALLS[name](**keywords, on_event=events.append)
        assert code == caught.value.exit_code
        assert said.endswith(f"error: {caught.value.message}\n")
        result = caught.value.result
    else:
        result = CALLS[name](**keywords, on_event=events.append)
    assert _without_chance(result.document) == _without_chance(json.loads(shown))
    assert _made(folder) == made
    assert all(note.message in said and note in events for note in result.notes)


@pytest.mark.parametrize("line", _lines(REFUSALS))
def test_both_refuse_the_same(
    line: str, place: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place("refused")
    before = _made(folder)
    name, keywords = _call(line)
    code = run(shlex.split(line))
    said = capsys.readouterr().err
    with pytest.raises(QuantcliError) as caught:
        CALLS[name](**keywords)
    error = caught.value
    lines = [f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else [])]
    assert said.splitlines()[-len(lines) :] == lines
    assert code == error.exit_code
    assert _made(folder) == before


def test_keywords_are_those_of_a_recipe() -> None:
    from quantcli.api.recipe_options import RecipeOptions

    assert list(RecipeOptions.__annotations__) == list(FIELDS)


@pytest.mark.parametrize("call", [*CALLS.values(), quantcli.inspect])
def test_a_misspelt_keyword_is_refused(call: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="takes no thread") as caught:
        call("model", thread=2)
    assert caught.value.hint == "did you mean threads?"


def test_one_entry_may_stand_for_a_list(mini: Path) -> None:
    one = quantcli.quantize(mini, dry_run=True, tensor_types="attn_v=Q8_0", force=True)
    many = quantcli.quantize(mini, dry_run=True, tensor_types=["attn_v=Q8_0"])
    assert one.document["tensors"] == many.document["tensors"]


@pytest.mark.parametrize("call", [*CALLS.values(), quantcli.inspect])
def test_no_threads_are_refused(call: Callable[..., Any], mini: Path) -> None:
    with pytest.raises(UsageError, match="--threads 0"):
        call(mini, threads=0)
