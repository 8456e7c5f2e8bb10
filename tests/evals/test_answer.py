"""A first answer, against llama.cpp run step by step and transformers' rendering of a template."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

import llama_cpp

import quantcli
from quantcli.api.answer import answer
from quantcli.cli.app import run as run_here
from quantcli.errors import QuantcliError
from quantcli.evals.answer import SEED, stream_answer
from quantcli.exports.chat import render_prompt

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def model(mini, tmp_path_factory) -> Path:
    return quantcli.quantize(mini, tmp_path_factory.mktemp("m") / "m.gguf", type="Q8_0").paths[0]


def by_hand(path: Path, text: str, count: int) -> str:
    """The likeliest token after each, by another binding's way to run llama.cpp."""
    llama = llama_cpp.Llama(
        str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1, n_gpu_layers=0
    )
    tokens = llama.tokenize(text.encode())
    begin, made = len(tokens), 0
    while made < count:
        llama.reset()
        llama.eval(tokens)
        tokens.append(int(np.argmax(llama.scores[len(tokens) - 1])))
        made += 1
    found = llama.detokenize(tokens)[len(llama.detokenize(tokens[:begin])) :]
    llama.close()
    return found.decode()


def test_it_is_what_llama_cpp_writes(model):
    text = "It is a truth universally acknowledged, that a"
    pieces = list(stream_answer(model, text, is_rendered=False, threads=1, most=12, temperature=0))
    assert len(pieces) > 3
    assert "".join(pieces) == by_hand(model, text, 12)


def test_the_same_seed_gives_the_same_answer(model):
    first, again = (
        "".join(stream_answer(model, "Once", is_rendered=False, threads=1, most=20))
        for _ in range(2)
    )
    assert first == again
    assert SEED == 0


def test_a_template_puts_the_prompt_into_a_conversation(mini, tmp_path, monkeypatch):
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT)
    path = quantcli.quantize(
        mini, tmp_path / "m.gguf", type="Q8_0", chat_template=str(template)
    ).paths[0]
    asked = {}

    def record(path, prompt, **more):
        asked.update(more, prompt=prompt)
        return iter(())

    monkeypatch.setattr("quantcli.api.answer.stream_answer", record)
    list(answer(path, "Hello!", threads=1))
    assert asked["is_rendered"]
    begin = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    bos = begin.detokenize([begin.token_bos()], special=True).decode()
    begin.close()
    assert asked["prompt"] == f"{bos}<|user|>Hello!\n<|assistant|>"


def test_a_rendered_beginning_is_not_doubled(model):
    """Greedy answers to the same tokens are the same, whoever wrote the beginning token."""
    plain = "".join(
        stream_answer(model, "Once upon", is_rendered=False, threads=1, most=8, temperature=0)
    )
    begin = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    bos = begin.detokenize([begin.token_bos()], special=True).decode()
    begin.close()
    marked = "".join(
        stream_answer(model, f"{bos}Once upon", is_rendered=True, threads=1, most=8, temperature=0)
    )
    assert marked == plain


def test_rendering_agrees_with_transformers(mini):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(mini)
    found = render_prompt(CHAT, "Hi\nthere", bos=tokenizer.bos_token, eos=tokenizer.eos_token)
    assert found == tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi\nthere"}],
        chat_template=CHAT, add_generation_prompt=True, tokenize=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for i in range(10**9) %}x{% endfor %}", "{{"]
)
def test_a_template_that_fails_gives_none(template):
    assert render_prompt(template, "Hi") is None


def test_the_command_shows_the_answer_and_prints_the_path(mini, tmp_path, capsys):
    path = tmp_path / "m.gguf"
    args = ["quantize", str(mini), "--bits", "8", "-o", str(path), "--run", "Once upon a"]
    assert run_here([*args, "-t", "1"]) == 0
    found = capsys.readouterr()
    assert found.out == f"{path}\n"
    said = "".join(answer(path, "Once upon a", threads=1))
    assert len(said) > 20
    assert found.err.endswith(f"\n\n{said}\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dry-run"], "--dry-run makes no file to run"),
        (["--to", "mlx"], "--run runs a GGUF in llama.cpp, not a folder for mlx"),
        (["--type", "Q4_0,Q8_0", "-o", "s/"], "--run runs one file, and this makes 2"),
        (["-q"], "--quiet shows no answer"),
    ],
)
def test_what_cannot_answer_is_said_before_the_work(args, message, mini, tmp_path, capsys,
                                                    monkeypatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run_here(["quantize", str(mini), *args, "--run", "Hi"]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_nothing_is_made(mini, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.chdir(tmp_path)
    assert run_here(["quantize", str(mini), "--bits", "4", "--run", "Hi"]) == 1
    said = capsys.readouterr().err
    assert said == (
        "error: the llama.cpp engine needs llama-cpp-python\nhint: pip install llama-cpp-python\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_has_no_answer(checkpoint, tmp_path):
    path = quantcli.quantize(checkpoint("bert"), tmp_path / "m.gguf", type="Q8_0").paths[0]
    with pytest.raises(QuantcliError, match="run on a prompt"):
        list(answer(path, "Hi", threads=1))
