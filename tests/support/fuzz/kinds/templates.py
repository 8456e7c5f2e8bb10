"""Chat templates wherever a model may keep them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from support.fuzz import micro
from support.fuzz.byte_edits import edit_bytes
from support.fuzz.case import Case, Kind, command

BOMBS = (
    "{% for a in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3,
    "{{ 3 ** (3 ** 15) }}",
    "{{ 'a' * 900000000 }}",
    "{{ [0] * 900000000 }}",
    "{{ 'x'.rjust(2000000000) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ '%999999999d' % 5 }}",
    "{{ range(10**9)|list|length }}",
    "{% set x = namespace(v='a') %}{% for i in range(60) %}"
    "{% set x.v = x.v ~ x.v %}{% endfor %}{{ x.v }}",
    "{% include '/etc/passwd' %}",
    "{% import 'x' as y %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y' * 100000) }}",
    "{% if " + "(" * 3000 + "1" + ")" * 3000 + " %}x{% endif %}",
    "{{ " + "[" * 2000 + "]" * 2000 + " }}",
    "{{ a" + ".b" * 5000 + " }}",
    "{% raw %}",
    "{{",
    "{% endfor %}",
    "{#",
    "{{ messages|map('upper')|join }}",
    "{{ 1/0 }}",
    "{{ undefined_name.x }}",
    "{% break %}",
    "{{ messages[99] }}",
    "{% generation %}{{ 'x' }}{% endgeneration %}",
    "{{ 'a'|indent(10**9) }}",
    "{{ ('a'*1000)|replace('a','b'*100000) }}",
    "{{ lipsum(n=100000) }}",
    "{{ cycler(*range(10**8)) }}",
    "{{ 'x'|center(10**10) }}",
    "{{ 10**5000 }}",
    "{%- for i in range(5) recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ tools|tojson(indent=10**6) }}",
    "FROM evil\n{{ messages[0].content }}",
    '"""\nSYSTEM x\n"""{{ messages[0]["content"] }}',
    "{{ '\\ud800' }}",
    "{{ messages|tojson }}" * 200,
    "{% set ns = namespace() %}{{ ns.x }}",
    "{{ '\x00\x1b[31m' }}",
    "x" * 200_000,
)
_PARTS = (
    "{% for message in messages %}",
    "{% endfor %}",
    "{{ message['content'] }}",
    "{{ message.role }}",
    "<|im_start|>",
    "<|im_end|>\n",
    "{% if add_generation_prompt %}",
    "{% endif %}",
    "{{ bos_token }}",
    "{% if message['role'] == 'system' %}",
    "{% else %}",
    "{{ eos_token }}",
    "[INST] ",
    " [/INST]",
    "{% set x = messages[1:] %}",
    "{{- '\\n' -}}",
    "{% if tools %}",
    "{{ tools | tojson }}",
    "\u202e",
    "\r\n",
    "{% if loop.first %}",
    "{{ raise_exception('x') }}",
    "{{ message.content | trim }}",
    "{% macro m() %}",
    "{% endmacro %}",
    "\x00",
    '"""',
    "FROM x\n",
    "{{ strftime_now('%d') }}",
    "{% filter upper %}",
    "{% endfilter %}",
)


def _make_template(chance: Random, folder: Path, bases: Any) -> Case:
    what = chance.choice(("bomb", "parts", "parts", "bytes", "tree"))
    value: Any
    if what == "bomb":
        text = chance.choice(BOMBS)
    elif what == "parts":
        text = "".join(chance.choices(_PARTS, k=chance.randrange(1, 14)))
    else:
        raw = edit_bytes(chance, micro.TEMPLATE.encode())
        text = raw.decode("utf-8", "replace")
    value = text
    if what == "tree":
        value = chance.choice(
            (
                [{"name": "default", "template": text}],
                [{"name": "tool_use", "template": text}],
                [{}],
                {"a": text},
                [{"name": 5, "template": None}],
                [text],
                5,
                [{"name": "default", "template": micro.TEMPLATE}] * 3,
                [],
                [{"name": "../x", "template": text}, {"name": "default", "template": text}],
            )
        )
    parts = dict(bases["files"])
    settings = json.loads(parts["tokenizer_config.json"])
    where = chance.choice(("settings", "settings", "jinja", "json", "option", "folder"))
    extra: tuple[str, ...] = ()
    if where == "settings" or not isinstance(value, str):
        settings["chat_template"] = value
    else:
        settings.pop("chat_template")
        if where == "json":
            parts["chat_template.json"] = json.dumps({"chat_template": value}).encode()
        elif where == "option":
            parts["option.txt"] = text.encode("utf-8", "surrogatepass")
            extra = ("--chat-template", "../in/m/option.txt")
        elif where == "jinja":
            parts["chat_template.jinja"] = text.encode("utf-8", "surrogatepass")
    parts["tokenizer_config.json"] = json.dumps(settings).encode()
    place = micro.write(folder / "m", parts)
    if where == "folder":
        (place / "additional_chat_templates").mkdir()
        (place / "additional_chat_templates" / "tool_use.jinja").write_bytes(
            text.encode("utf-8", "surrogatepass")
        )
    commands = [
        command("quantize", "../in/m", "--type", "Q8_0", "-o", "m.gguf", "--threads", "1", *extra)
    ]
    choice = chance.random()
    if choice < 0.25:
        commands.append(command("export", "m.gguf", "--to", "ollama", "-o", "Modelfile"))
    elif choice < 0.5:
        commands.append(command("inspect", "m.gguf", "--kv", sound=True))
    elif choice < 0.75:
        commands.append(command("export", "m.gguf", "--to", "hf", "-o", "back", "--threads", "1"))
    else:
        commands = [
            command("quantize", "../in/m", *chance.choice(micro.LAYOUTS), "-o", "f", *extra)
        ]
    return Case(f"{what} in {where}: {text[:60]!r}", tuple(commands))


def _warm(_: Path) -> Any:
    return {"files": micro.files()}


KINDS = (Kind("templates", _warm, _make_template),)
