"""Modelfiles: Go's template writes what transformers' Jinja writes, or there is none."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path

import pytest
from support.go_template import render

import quantcli
from quantcli.errors import SourceError
from quantcli.exports.chat import explain_template
from quantcli.exports.ollama import go_template

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}\n"
    "{%- else %}\n"
    "    {{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'user' or message.role == 'assistant' %}\n"
    "        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}\n"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
    "{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML, "qwen": QWEN, "llama 3": LLAMA3, "gemma 2": GEMMA2, "llama 2": LLAMA2,
    "zephyr": ZEPHYR,
}  # fmt: skip
TALK = [
    ("user", "Hello, who are you?"),
    ("assistant", "A model."),
    ("user", "What {is} a <model>?"),
    ("assistant", 'A "thing"\nof lines.'),
    ("user", "Thanks."),
]
CHATS = [TALK[:1], TALK[:3], TALK, *([("system", "Be brief."), *TALK[:n]] for n in (1, 3, 5))]


@pytest.mark.parametrize("name", TEMPLATES)
def test_go_writes_what_transformers_writes(name: str) -> None:
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    explained = explain_template(TEMPLATES[name], bos="<s>", eos="</s>")
    assert explained is not None
    template = go_template(explained)
    for messages in CHATS:
        if messages[0][0] == "system" and not explained.takes_system:
            continue
        rendered, _ = chat.render_jinja_template(
            conversations=[[{"role": role, "content": words} for role, words in messages]],
            chat_template=TEMPLATES[name],
            add_generation_prompt=True,
            bos_token="<s>",
            eos_token="</s>",
        )
        data = {"Messages": [{"Role": role, "Content": words} for role, words in messages]}
        assert render(template, data) == rendered[0].removeprefix("<s>")


def test_a_system_message_that_a_template_does_not_take_goes_before_the_first_words() -> None:
    explained = explain_template(GEMMA2, bos="<s>", eos="</s>")
    assert explained is not None
    data = {"Messages": [{"Role": "system", "Content": "S"}, {"Role": "user", "Content": "U"}]}
    assert render(go_template(explained), data) == (
        "<start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\n"
    )


def test_bos_stays_where_the_runtime_does_not_add_it() -> None:
    explained = explain_template(LLAMA3, bos="<s>", adds_bos=False)
    assert explained is not None
    assert explained.first.startswith("<s><|start_header_id|>user")


NOT_EXPLAINED = {
    "a date": "{{ strftime_now('%d %b') }}" + CHATML,
    "thoughts": CHATML.replace("message['content']", "message['content'].split('α')[-1]"),
    "last words first": "{{ messages[-1].content }}" + CHATML,
    "numbers": "{% for m in messages %}{{ loop.index }}{{ m.role }}{{ m.content }}{% endfor %}",
    "broken": "{% for m in messages %}",
    "an error": "{{ messages[0].content + 1 }}",
    "no end": "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
    "a way out": "{{ ''.__class__.__mro__[1].__subclasses__() }}" + CHATML,
    "a longer talk": CHATML + "{% if messages | length > 4 %}!{% endif %}",
}


@pytest.mark.parametrize("template", NOT_EXPLAINED.values(), ids=NOT_EXPLAINED.keys())
def test_what_does_more_is_not_explained(template: str) -> None:
    assert explain_template(template) is None


ENDLESS = {
    "nested ranges": "{% set n = 99999 %}"
    "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}",
    "a power": "{{ 3 ** (3 ** 15) }}",
    "a long text": "{{ 'a' * 900000000 }}",
    "a long list": "{% set x = [0] * 900000000 %}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS.keys())
def test_what_never_ends_or_takes_all_memory_is_not_explained(template: str) -> None:
    """The process's own peak does not move, and an answer comes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.monotonic()
    assert explain_template(template + CHATML) is None
    assert time.monotonic() - begun < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 64 << 10


@pytest.fixture
def source(mini: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(mini, folder)
    settings = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_a_modelfile(source: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").write_text(CHATML)
    file = quantcli.quantize(source, tmp_path / "m.gguf", type="Q8_0").paths[0]
    (path,) = quantcli.export(file, to="ollama").paths
    assert path == tmp_path / "m.Modelfile"
    lines = path.read_text().splitlines()
    assert lines[1] == "FROM ./m.gguf"
    assert lines[3].startswith('TEMPLATE """{{- $before := "" }}')
    assert lines[-5:] == [
        "PARAMETER temperature 0.6",
        "PARAMETER top_k 20",
        "PARAMETER top_p 0.95",
        "PARAMETER repeat_penalty 1.05",
        'PARAMETER stop "<|end_of_text|>"',
    ]
    (tmp_path / "elsewhere").mkdir()
    (path,) = quantcli.export(file, tmp_path / "elsewhere" / "Modelfile", to="ollama").paths
    assert f"FROM {file.resolve()}" in path.read_text()


def test_without_a_template_there_is_none(source: Path, tmp_path: Path) -> None:
    from quantcli.exports.job import make_options, open_export
    from quantcli.types import Note

    for template, words in ((None, "has no chat template"), ("{{ x() }}", "does more than put")):
        if template is not None:
            (source / "chat_template.jinja").write_text(template)
        file = quantcli.quantize(source, tmp_path / "m.gguf", type="Q8_0", force=True).paths[0]
        with open_export([file], "ollama", make_options("ollama", force=True)) as prepared:
            note, done = list(prepared.run())
        assert isinstance(note, Note)
        assert words in note.message
        assert "TEMPLATE" not in done.paths[0].read_text()


def test_shards_and_checkpoints_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is a checkpoint, and Ollama's FROM takes a GGUF"):
        quantcli.export(source, to="ollama")
    done = quantcli.quantize(source, tmp_path / "m.gguf", type="BF16", split_max_size="3M")
    with pytest.raises(SourceError, match=f"is in {len(done.paths)} shards"):
        quantcli.export(done.paths[0], to="ollama")


def test_a_tokens_text_makes_no_line_of_its_own(source: Path, tmp_path: Path) -> None:
    """A planted FROM would run another model."""
    file = quantcli.quantize(source, tmp_path / "m.gguf", type="Q8_0").paths[0]
    raw = file.read_bytes()
    with quantcli.open_model(file) as model:
        end = str(
            model.metadata["tokenizer.ggml.tokens"].value[
                model.metadata["tokenizer.ggml.eos_token_id"].value
            ]
        )
    assert len(end) > 10
    planted = ("x\nFROM b" + "y" * len(end))[: len(end)].encode()
    (tmp_path / "odd.gguf").write_bytes(raw.replace(end.encode(), planted))
    done = quantcli.export(tmp_path / "odd.gguf", to="ollama")
    lines = done.paths[0].read_text().splitlines()
    assert [line for line in lines if line.startswith("FROM")] == ["FROM ./odd.gguf"]
    assert not any("FROM b" in line for line in lines)
    assert any("cannot say" in note.message for note in done.notes)
    named = tmp_path / "a\nFROM b.gguf"
    named.write_bytes(raw)
    with pytest.raises(SourceError, match="takes no such name"):
        quantcli.export(named, to="ollama")
