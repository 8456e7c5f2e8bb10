"""What goes wrong on the first day is said with a next step before the work, and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantcli.cli.app import run as run_here

CASES: dict[str, tuple[str, int, str, str]] = {
    "bits beside a set": ("quantize {mini} --bits 4 --set small", 2,
                          "--bits and --set exclude each other", "--set small --type Q4_K_M"),
    "a runtime for a format": ("quantize {mini} --to vllm", 2, "no output format named 'vllm'",
                               "did you mean compressed-tensors?"),
    "a runtime for an export": ("export {mini} --to vLLM", 2, "no export format named 'vLLM'",
                               "did you mean compressed-tensors?"),
    "a file as a folder": ("quantize {mini} -o {text}/x.gguf", 1, "is a file, not a folder", "-o"),
    "another format's name": ("quantize {mini} -o {place}/x.safetensors", 2,
                              "x.safetensors is no name for one", "x.gguf"),
    "a size without costs": ("quantize {mini} --target-size 1M", 2,
                             "--target-size needs to know what each choice costs", "--imatrix"),
    "a text as importance": ("quantize {mini} --imatrix {text} -o {place}/x.gguf", 1,
                             "not an importance matrix", "quantcli calibrate MODEL --data TEXT"),
    "a model as importance": ("quantize {mini} --imatrix {model} -o {place}/x.gguf", 1,
                              "without importance data", "quantcli calibrate MODEL"),
    "a type that needs importance": (
        "quantize {mini} --type IQ2_XXS,Q4_K_M -o {place}/set/", 2,
        "IQ2_XXS needs an importance matrix", "--calibrate TEXT or --imatrix FILE"),
    "a model as a text": ("eval-ppl {model} --data {model}", 1, "is not UTF-8", "it is a model"),
    "a data set by half its name": ("eval-ppl {model} --data org/name", 1, "there is no such file",
                                    "NAME:CONFIG:SPLIT"),
    "conversations": ("eval-ppl {model} --data {chat}", 1, "the model has no chat template",
                      "quantcli quantize --chat-template FILE"),
    "a broken line": ("eval-ppl {model} --data {broken}", 1, "is not JSON", "mend the line"),
    "no text": ("eval-ppl {model}", 2, "there is no text to evaluate on", "--data"),
    "a limit without a base": ("eval-ppl {model} --data {text} --max-kld 1", 2,
                               "--max-kld needs a base", "--base FILE"),
    "a file that ends early": ("inspect {cut}", 1, "more than its 100 bytes can hold",
                               "download is incomplete"),
    "an empty folder": ("inspect {place}", 1, "holds no model.safetensors", "config.json"),
    "a cache of no type": ("inspect {model} --fit 8G --kv q9", 2, "no KV cache of type q9", "q8_0"),
    "an option without a value": ("inspect {mini} --fit", 2, "'--fit' requires an argument",
                                  "quantcli inspect --help"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    names = {key: folder / name for key, name in
             {"model": "m.gguf", "text": "t.txt", "chat": "chat.jsonl", "broken": "b.jsonl",
              "cut": "cut.gguf"}.items()}  # fmt: skip
    assert run_here(["quantize", str(mini), "--type", "Q4_0", "-q", "-o", str(names["model"])]) == 0
    names["text"].write_text("It is a truth universally acknowledged. " * 10)
    names["chat"].write_text('{"messages": [{"role": "user", "content": "Good day"}]}\n')
    names["broken"].write_text('{"text": \n')
    names["cut"].write_bytes(names["model"].read_bytes()[:100])
    return {key: str(path) for key, path in names.items()} | {"mini": str(mini)}


@pytest.mark.parametrize("case", CASES)
def test_the_next_step_is_named(
    case: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    line, code, message, hint = CASES[case]
    if "eval-ppl" in line:
        pytest.importorskip("llama_cpp")
    monkeypatch.chdir(tmp_path)
    assert run_here(line.format(place=tmp_path, **files).split()) == code
    said, _, step = capsys.readouterr().err.partition("\nhint: ")
    assert message in said
    assert hint in step
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of processes")
def test_a_file_that_may_not_grow(mini: Path, tmp_path: Path) -> None:
    """A limit of 2 MB, as a full disk: nothing is left, and what helps is said."""
    import resource

    done = subprocess.run(
        [sys.executable, "-m", "quantcli", "quantize", mini, "--type", "Q8_0"],
        cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "bookworm-mini-Q8_0.gguf: File too large" in done.stderr
    assert "ulimit -f" in done.stderr
    assert list(tmp_path.iterdir()) == []
