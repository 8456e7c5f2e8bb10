"""Greedy agreement: what the base writes is what transformers' ``generate`` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantcli.cli.app import run as run_here
from quantcli.evals.artifacts import open_artifact
from quantcli.evals.greedy import Continuation, continue_windows, follow
from quantcli.evals.windows import cut

pytest.importorskip("torch")
pytest.importorskip("transformers")
TEXT = Path(__file__).parents[1] / "data" / "pride-and-prejudice.txt"
COUNT, CONTEXT = 12, 64


@pytest.fixture(scope="module")
def written(mini: Path) -> list[list[int]]:
    """The continuations of the first half windows, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(mini, dtype=torch.float32)
    found = []
    for window in _windows(mini):
        prompt = torch.from_numpy(window.tokens[: CONTEXT // 2].astype(np.int64))[None]
        whole = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=COUNT, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        found.append(whole[0, CONTEXT // 2 :].tolist())
    return found


def _windows(mini: Path) -> Any:
    with open_artifact(str(mini), engine="torch").model as model:
        from quantcli.layerwise.windows import Tokenizer

        tokenizer = Tokenizer(model)
        ids = tokenizer.encode(TEXT.read_text())
    return cut(ids, CONTEXT, begin=tokenizer.bos, chunks=3)


@pytest.mark.parametrize("engine", ["torch", "llama.cpp"])
def test_the_base_writes_what_transformers_writes(
    engine: str, mini: Path, gguf: Callable[[str], Path], written: list[list[int]]
) -> None:
    if engine == "llama.cpp":
        pytest.importorskip("llama_cpp")
    opened = open_artifact(str(mini if engine == "torch" else gguf("BF16")), engine=engine)
    with opened.model:
        loaded = opened.load(CONTEXT, 1)
        found = continue_windows(loaded, _windows(mini), COUNT)
        again = follow(loaded, found)
        loaded.close()
    assert [each.written.tolist() for each in found] == written
    assert again.agreement.value == again.whole.value == 1.0
    assert again.alike.value == COUNT


def test_tokens_alike_are_those_that_the_model_writes_itself(
    gguf: Callable[[str], Path], mini: Path
) -> None:
    pytest.importorskip("llama_cpp")
    windows = _windows(mini)
    both: list[list[Continuation]] = []
    models = [open_artifact(str(gguf(kind)), engine="llama.cpp") for kind in ("BF16", "Q2_K")]
    engines = [model.load(CONTEXT, 1) for model in models]
    both = [continue_windows(engine, windows, COUNT) for engine in engines]
    found = follow(engines[1], both[0])
    for engine, model in zip(engines, models, strict=True):
        engine.close()
        model.model.store.close()
    lengths = []
    for base, own in zip(*both, strict=True):
        apart = np.flatnonzero(base.written != own.written)
        lengths.append(int(apart[0]) if len(apart) else COUNT)
    assert found.alike.value == pytest.approx(np.mean(lengths))
    assert found.whole.value == pytest.approx(np.mean([n == COUNT for n in lengths]))
    assert found.alike.value < COUNT
    assert found.agreement.value >= found.alike.value / COUNT


def test_the_floor_is_the_reference_in_the_other_engine(
    gguf: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp")
    command = ["eval-ppl", str(gguf("Q8_0")), str(gguf("Q2_K")), "--reference", str(gguf("BF16"))]
    command += ["--data", str(TEXT), "--ctx", "64", "--chunks", "4", "--threads", "1"]
    assert run_here([*command, "--floor", "--greedy", "8", "--json", "--max-kld", "1000"]) == 0
    document = json.loads(capsys.readouterr().out)
    (floor,) = document["floors"]
    assert floor["engine"] == "torch"
    assert floor["artifact"] == str(gguf("BF16"))
    eight, two = document["results"]
    assert 0 < floor["kld"]["value"] < eight["kld"]["value"] < two["kld"]["value"]
    assert floor["same_top"]["value"] > 0.97
    assert eight["greedy"]["agreement"]["value"] >= two["greedy"]["agreement"]["value"]
    assert [gate["artifact"] for gate in document["gates"]] == [
        str(gguf("Q8_0")),
        str(gguf("Q2_K")),
    ]
    assert run_here([*command, "--floor", "--greedy", "8"]) == 0
    shown = capsys.readouterr().out
    assert "noise floor (torch)" in shown
    assert "Of 8 tokens that the base writes after 4 prompts" in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--greedy 8", "add --reference"),
        ("--greedy 40 --reference {q8}", "is not between 1 and half the window, 32"),
        ("--floor", "add --reference"),
        ("--floor --reference {mini}", "is a checkpoint"),
        ("--min-greedy 0.9 --reference {q8}", "add --greedy"),
        ("--min-greedy 90 --greedy 8 --reference {q8}", "not a share"),
        ("--min-speed 3", "add --speed"),
        ("--max-memory lots", "lots"),
    ],
)
def test_wishes_that_cannot_be_met(
    options: str, said: str, mini: Path, gguf: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = options.format(q8=gguf("Q8_0"), mini=mini).split()
    command = ["eval-ppl", str(gguf("Q2_K")), "--data", str(TEXT), "--ctx", "64", *words]
    assert run_here(command) in (1, 2)
    assert said in capsys.readouterr().err.replace("\n", " ")
