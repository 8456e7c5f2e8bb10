"""Chat templates: Jinja text that llama.cpp renders a conversation with.

They stand in chat_template.jinja with further ones under additional_chat_templates/, in
tokenizer_config.json, or in chat_template.json of multimodal models; files go before
tokenizer_config.json, as in transformers. The one named "default" is ``tokenizer.chat_template``,
others are ``tokenizer.chat_template.NAME`` with their names in ``tokenizer.chat_templates``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from quantcli.errors import VocabularyError
from quantcli.types import MetaValue, array, text
from quantcli.vocab.files import TokenizerFiles, read_json
from quantcli.whole_files import read_whole_text

TEMPLATE_KEY = "tokenizer.chat_template"


def template_key_values(files: TokenizerFiles) -> dict[str, MetaValue]:
    """The folder's chat templates as key-values; empty where it has none."""
    templates = {
        re.sub(r"[^A-Za-z0-9]", "_", name): template
        for name, template in _read_templates(files).items()
    }
    result: dict[str, MetaValue] = {}
    others = sorted(name for name in templates if name != "default")
    if "default" in templates:
        result[TEMPLATE_KEY] = text(templates["default"])
    for name in others:
        result[f"{TEMPLATE_KEY}.{name}"] = text(templates[name])
    if others:
        result[f"{TEMPLATE_KEY}s"] = array("str", others)
    return result


_HEAD = 20_000
_OUTPUT = re.compile(r"\{\{-?\s*(.*?)-?\}\}", re.DOTALL)
_TAGS = re.compile(r"\{%.*?%\}|\{#.*?#\}", re.DOTALL)


def begins_with_special(files: TokenizerFiles, special: Collection[str]) -> bool:
    """Whether a conversation begins with one of the ``special`` tokens, by the first text that the
    default template writes."""
    # What begins a conversation stands early; the expressions are quadratic in hostile text.
    template = _TAGS.sub("", _read_templates(files).get("default", "")[:_HEAD])
    read = 0
    for output in _OUTPUT.finditer(template):
        literal = template[read : output.start()].strip()
        read = output.end()
        if literal:
            return literal.startswith(tuple(special))
        first = output[1]
        if not first.startswith("raise_exception"):
            return first.startswith("bos_token") or first[1:].startswith(tuple(special))
    return False


def _read_templates(files: TokenizerFiles) -> dict[str, str]:
    found = _stored_templates(files)
    return found if files.template is None else {**found, "default": files.template}


def _stored_templates(files: TokenizerFiles) -> dict[str, str]:
    single = files.folder / "chat_template.jinja"
    more = sorted((files.folder / "additional_chat_templates").glob("*.jinja"))
    if single.is_file() or more:
        default = {"default": _read_text(single)} if single.is_file() else {}
        return default | {path.stem: _read_text(path) for path in more}
    if (value := files.tokenizer_config.get("chat_template")) is not None:
        return _named(value, files.path("tokenizer_config.json"))
    multimodal = files.folder / "chat_template.json"
    if multimodal.is_file():
        value = read_json(multimodal, dict[str, Any]).get("chat_template")
        return {} if value is None else _named(value, str(multimodal))
    return {}


def _named(value: Any, file: str) -> dict[str, str]:
    """A template as text, a list of {name, template}, or an object of templates by name."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        entries = [(entry.get("name"), entry.get("template")) if isinstance(entry, Mapping)
                   else (None, None) for entry in value]  # fmt: skip
    else:
        entries = list(value.items()) if isinstance(value, Mapping) else [(None, None)]
    result: dict[str, str] = {}
    for name, template in entries:
        if not isinstance(name, str) or not name or not isinstance(template, str):
            raise VocabularyError(
                f"{file}: chat_template is neither text nor a list of templates with a name"
            )
        result[name] = template
    return result


def _read_text(path: Path) -> str:
    try:
        return read_whole_text(path)
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{path} is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise VocabularyError(f"{path} cannot be read: {error.strerror}") from error
