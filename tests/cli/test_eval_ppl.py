"""``quantcli eval-ppl``, as it is typed, on the small real model."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from quantcli.cli.app import run as run_here

pytest.importorskip("llama_cpp")

DATA = Path(__file__).parents[1] / "data"
MINI = DATA / "bookworm-mini"
TEXT = DATA / "pride-and-prejudice.txt"
SHORT = ("--ctx", "64", "--chunks", "2", "-t", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    from quantcli.artifacts.gguf_file import prepare_gguf
    from quantcli.artifacts.write import write_artifact
    from quantcli.model import open_model
    from quantcli.plan.recipe import Recipe

    folder = tmp_path_factory.mktemp("models")
    made = {}
    for kind in ("BF16", "Q8_0", "Q2_K"):
        made[kind] = folder / f"mini-{kind}.gguf"
        with open_model(MINI) as model:
            for _ in write_artifact(prepare_gguf(model, Recipe(type=kind), made[kind]), threads=1):
                pass
    return made


@pytest.fixture
def evaluate(capsys):
    """``evaluate(args..., code=0)``: standard output, or standard error of a failure."""

    def call(*args: object, code: int = 0) -> str:
        found = run_here(["eval-ppl", *map(str, args)])
        captured = capsys.readouterr()
        assert found == code, captured.err
        return captured.out if code == 0 else captured.err

    return call


def _json(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    assert found["schema"] == "quantcli.eval-ppl/1"
    return found


def test_a_perplexity(evaluate, models) -> None:
    text = evaluate(models["Q8_0"], "--data", TEXT, *SHORT)
    assert "2 windows of 64 tokens, 62 scored (second half of each window), llama.cpp" in text
    assert "perplexity" in text
    assert "KLD" not in text


def test_line_ends_of_windows_are_newlines_and_long_windows_are_warned_of(
    models, tmp_path, capsys
) -> None:
    """A perplexity must not move from 52 to 143 by them, and not without a word."""
    text = tmp_path / "windows.txt"
    text.write_bytes(TEXT.read_bytes().replace(b"\n", b"\r\n"))
    scores = []
    for file in (TEXT, text):
        command = ["eval-ppl", str(models["Q8_0"]), "--data", str(file), "--json", *SHORT]
        assert run_here(command) == 0
        found = capsys.readouterr()
        scores.append(found.out)
        assert ("line ends of Windows (CRLF), which are read as newlines" in found.err) is (
            file is text
        )
    assert scores[0].replace(str(TEXT), "") == scores[1].replace(str(text), "")
    long = ["--ctx", "2049", "--chunks", "1", "-t", "1"]
    assert run_here(["eval-ppl", str(models["Q8_0"]), "--data", str(TEXT), *long]) == 0
    assert "takes 2048 tokens, and windows have 2049" in capsys.readouterr().err


def test_several_models_against_a_reference(evaluate, models, tmp_path) -> None:
    picture = tmp_path / "kld.svg"
    text = evaluate(
        models["Q8_0"], models["Q2_K"], "--reference", models["BF16"], "--data", TEXT,
        "--plot", picture, *SHORT,
    )  # fmt: skip
    title, header, base, fine, coarse = text.splitlines()[:5]
    assert str(TEXT) in title
    assert header.split()[-5:] == ["99", "%", "99.9", "%", "same", "top"][-5:]
    assert base.split()[-1] == "base"
    assert "mini-Q8_0.gguf" in fine
    assert "mini-Q2_K.gguf" in coarse
    root = ElementTree.parse(picture).getroot()
    labels = ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "mini-Q8_0.gguf" in labels
    assert "mini-Q2_K.gguf" in labels
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 2


def test_every_text_is_reported(evaluate, models, tmp_path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT.read_text(encoding="utf-8")[4000:6000], encoding="utf-8")
    found = _json(evaluate(models["Q8_0"], "--data", TEXT, "--data", other, "--json", *SHORT))
    assert [result["text"] for result in found["results"]] == [str(TEXT), str(other)]
    values = [result["perplexity"]["value"] for result in found["results"]]
    assert values[0] != values[1]


def test_json_has_every_figure(evaluate, models) -> None:
    found = _json(
        evaluate(models["Q2_K"], "--reference", MINI, "--data", TEXT, "--json",
                 "--max-kld", "9", *SHORT)
    )  # fmt: skip
    (result,) = found["results"]
    assert (found["context"], found["reference"], found["reference_engine"]) == (
        64, str(MINI), "torch",
    )  # fmt: skip
    assert result["engine"] == "llama.cpp"
    assert result["bytes"] == models["Q2_K"].stat().st_size
    assert 3 < result["bits_per_weight"] < 5
    assert result["kld"]["exact"] is True
    assert 0.01 < result["kld"]["value"] < 1
    assert result["ratio"]["value"] == pytest.approx(
        result["perplexity"]["value"] / result["base_perplexity"]["value"]
    )
    assert found["gates"] == [
        {
            "gate": "max-kld", "limit": 9, "value": result["kld"]["value"], "passed": True,
            "artifact": str(models["Q2_K"]), "text": str(TEXT),
        }
    ]  # fmt: skip


def test_a_gate_that_fails_is_exit_code_3_after_the_figures(models, capsys) -> None:
    args = [models["Q2_K"], "--reference", models["BF16"], "--data", TEXT, "--json", *SHORT]
    args += ["--max-ppl", "1", "--max-kld", "0.0001", "--min-top1", "1"]
    args += ["--max-ppl-ratio", "0.9", "--max-kld99", "0.001", "--max-kld999", "0.001"]
    assert run_here(["eval-ppl", *map(str, args)]) == 3
    captured = capsys.readouterr()
    found = _json(captured.out)
    (result,), gates = found["results"], found["gates"]
    assert [gate["passed"] for gate in gates] == [False] * 6
    assert {gate["gate"]: gate["value"] for gate in gates} == {
        "max-ppl": result["perplexity"]["value"],
        "max-ppl-ratio": result["ratio"]["value"],
        "max-kld": result["kld"]["value"],
        "max-kld99": result["kld"]["quantiles"]["0.99"],
        "max-kld999": result["kld"]["quantiles"]["0.999"],
        "min-top1": result["same_top"]["value"],
    }
    for name in ("perplexity", "mean KL divergence", "99.9 % quantile", "top-1 agreement"):
        assert name in captured.err


@pytest.mark.parametrize("compact", [(), ("--top-k", "32")])
def test_a_saved_base_stands_for_its_model(evaluate, models, tmp_path, compact) -> None:
    base = tmp_path / "base.kld"
    evaluate(models["BF16"], "--data", TEXT, "--save-base", base, *compact, *SHORT)
    beside = _json(
        evaluate(models["Q2_K"], "--reference", models["BF16"], "--data", TEXT, "--json", *SHORT)
    )["results"][0]
    # The text and the context come from the file.
    stored = _json(evaluate(models["Q2_K"], "--base", base, "--json", "-t", "1"))["results"][0]
    assert stored["perplexity"] == beside["perplexity"]
    assert stored["same_top"] == beside["same_top"]
    if compact:
        assert not stored["kld"]["exact"]
        assert stored["kld"]["value"] < beside["kld"]["value"] < stored["kld"]["at_most"]
        text = evaluate(models["Q2_K"], "--base", base, "-t", "1")
        assert "its figures are lower bounds" in text
    else:
        assert stored["kld"]["value"] == pytest.approx(beside["kld"]["value"], rel=2e-3)


def test_a_base_of_another_run_is_refused(evaluate, models, tmp_path) -> None:
    base, other = tmp_path / "base.kld", tmp_path / "other.txt"
    evaluate(models["BF16"], "--data", TEXT, "--save-base", base, *SHORT)
    other.write_text(TEXT.read_text(encoding="utf-8")[500:3000], encoding="utf-8")
    message = evaluate(models["Q8_0"], "--base", base, "--data", other, code=1)
    assert f"{base} was made with another text than {other}" in message
    message = evaluate(models["Q8_0"], "--base", base, "--ctx", "128", code=1)
    assert "was made with a context of 64 tokens, not 128" in message
    message = evaluate(models["BF16"], "--data", TEXT, "--save-base", base, *SHORT, code=1)
    assert "exists already" in message
    raw = base.read_bytes()
    base.write_bytes(raw[:100] + raw[108:])
    assert "bytes, but its header makes it" in evaluate(models["Q8_0"], "--base", base, code=1)


def _other_vocabulary(folder: Path) -> Path:
    """A model of 4096 tokens that cuts a text otherwise: its first merge is gone."""
    shutil.copytree(MINI, folder)
    path = folder / "tokenizer.json"
    path.chmod(0o644)
    words = json.loads(path.read_text(encoding="utf-8"))
    words["model"]["merges"] = words["model"]["merges"][50:]
    path.write_text(json.dumps(words), encoding="utf-8")
    return folder


def test_a_reference_with_another_vocabulary_is_refused(evaluate, models, tmp_path) -> None:
    from support.tiny_models import MODELS, build

    message = evaluate(
        models["Q8_0"], "--reference", _other_vocabulary(tmp_path / "cut"), "--data", TEXT,
        *SHORT, code=1,
    )  # fmt: skip
    assert "into other tokens than" in message
    small = dict(MODELS["llama-tied"].config, vocab_size=4160)
    MODELS["small"] = type(MODELS["llama"])("LlamaForCausalLM", small)
    try:
        folder = build("small", tmp_path / "small")
    finally:
        del MODELS["small"]
    message = evaluate(models["Q8_0"], "--reference", folder, "--data", TEXT, *SHORT, code=1)
    assert "has a vocabulary of 4096 tokens and" in message
    assert "one of 4160" in message


BAD_TEXTS = {
    "short": (b"It is a truth universally acknowledged.", "is too short"),
    "empty": (b"", "is empty"),
    "blank": (b"\n \n", "is empty"),
    "not UTF-8": (b"caf\xe9 " * 500, "is not UTF-8: byte 0xe9 at offset 3"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_text_that_cannot_be_used(evaluate, models, tmp_path, kind) -> None:
    raw, message = BAD_TEXTS[kind]
    path = tmp_path / "bad.txt"
    path.write_bytes(raw)
    assert message in evaluate(models["Q8_0"], "--data", path, code=1)


USAGE = {
    "no text": ((), "there is no text to evaluate on"),
    "an unknown engine": (("--data", TEXT, "--engine", "lama.cpp"), "did you mean llama.cpp?"),
    "two bases": (
        ("--data", TEXT, "--reference", MINI, "--base", "{base}"),
        "--reference and --base exclude each other",
    ),
    "a gate without a base": (("--data", TEXT, "--max-kld", "1"), "needs a base"),
    "a plot without a base": (("--data", TEXT, "--plot", "x.svg"), "divergence from a base"),
    "a short context": (("--data", TEXT, "--ctx", "4"), "context of 4 tokens is too short"),
    "a long stride": (("--data", TEXT, "--stride", "512"), "stride of 512 is not between"),
    "a stride and a saved base": (
        ("--data", TEXT, "--stride", "16", "--save-base", "{new}"),
        "windows that do not overlap",
    ),
    "two texts and a saved base": (
        ("--data", TEXT, "--data", TEXT, "--save-base", "{new}"),
        "holds one text",
    ),
    "compact rows of nothing": (("--data", TEXT, "--top-k", "5"), "--top-k belongs to --save-base"),
}


@pytest.mark.parametrize("kind", USAGE)
def test_usage(evaluate, models, tmp_path, kind) -> None:
    args, message = USAGE[kind]
    base, new = tmp_path / "base", tmp_path / "new"
    if "{base}" in args:
        evaluate(models["BF16"], "--data", TEXT, "--save-base", base, *SHORT)
    names = {"{base}": base, "{new}": new}
    args = [names.get(str(arg), arg) for arg in args]
    assert message in evaluate(models["Q8_0"], *args, code=2)
    assert not new.exists()


def test_llama_cpp_runs_no_checkpoint(evaluate) -> None:
    message = evaluate(MINI, "--data", TEXT, "--engine", "llama.cpp", *SHORT, code=1)
    assert "is a checkpoint, and llama.cpp runs GGUF files only" in message


@pytest.mark.parametrize(
    ("engine", "module", "extra"),
    [("torch", "torch", "torch transformers"), ("llama.cpp", "llama_cpp", "llama-cpp-python")],
)
def test_a_missing_engine_names_its_install_command(
    evaluate, models, monkeypatch, engine, module, extra
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    message = evaluate(models["Q8_0"], "--data", TEXT, "--engine", engine, *SHORT, code=1)
    assert f"pip install {extra}" in message


def test_a_gguf_without_any_engine_names_the_smaller_one(evaluate, models, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    monkeypatch.setattr("quantcli.evals.artifacts.find_spec", lambda name: None)
    message = evaluate(models["Q8_0"], "--data", TEXT, *SHORT, code=1)
    assert "pip install llama-cpp-python" in message


def test_a_broken_gguf_is_refused(evaluate, models, tmp_path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(models["Q8_0"].read_bytes()[:-1000])
    message = evaluate(broken, "--data", TEXT, *SHORT, code=1)
    assert str(broken) in message
    assert "Traceback" not in message
