"""Chat templates rendered: conversations into the text that a model was trained on.

Templates come out of files that anybody made, so they run in Jinja's sandbox, and in a child
process with limits of time and memory, which the sandbox does not set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quantcli.bounded import BoundError, call_bounded
from quantcli.errors import SourceError
from quantcli.types import MetaValue

Conversation = Sequence[Mapping[str, Any]]
"""Messages in their order, each with its "role" and "content"."""

_SECONDS, _MEMORY = 60.0, 2 << 30
_AT_ONCE = 200
"""Conversations that a child renders: the limits are theirs together."""


def render_conversations(
    metadata: Mapping[str, MetaValue], conversations: Sequence[Conversation], label: str
) -> str:
    """All conversations through the model's own template, one after the other.

    The beginning token is left out of the first, since a tokenizer puts it there. SourceError for a
    model without a template, and for a conversation that it does not take, by its number.
    """
    template = metadata.get("tokenizer.chat_template")
    if template is None:
        raise SourceError(
            f"{label} holds conversations, and the model has no chat template",
            hint="--field names a key that holds plain text; 'quantcli quantize --chat-template "
            "FILE' gives the model a template",
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    begin, end = (
        _text(tokens, metadata.get(f"tokenizer.ggml.{name}_token_id")) for name in ("bos", "eos")
    )
    parts: list[str] = []
    for start in range(0, len(conversations), _AT_ONCE):
        some = conversations[start : start + _AT_ONCE]
        question = {"template": str(template.value), "bos": begin, "eos": end, "some": list(some)}
        try:
            found = call_bounded(
                "quantcli.vocab.chat_template:answer", question, seconds=_SECONDS, memory=_MEMORY
            )
        except BoundError:
            raise SourceError(
                f"{label}: the model's chat template takes more time or memory than it may"
            ) from None
        if isinstance(found, dict):
            raise SourceError(
                f"{label}, conversation {start + found['number'] + 1}: the chat template does not "
                f"take it: {found['said']}"
            )
        parts += found
    whole = "".join(parts)
    return whole.removeprefix(begin) if begin else whole


def answer(question: Mapping[str, Any]) -> list[str] | dict[str, Any]:
    """The child's part: the conversations' texts, or what is wrong with the first refused."""
    rendered = []
    for number, messages in enumerate(question["some"]):
        try:
            text = render(question["template"], messages, question["bos"], question["eos"])
        except Exception as error:
            # Whatever a stranger's program stumbles over.
            said = " ".join(str(error).split())[:200] or type(error).__name__
            return {"number": number, "said": said}
        rendered.append(text)
    return rendered


def render(template: str, messages: Conversation, bos: str, eos: str, *, asks: bool = False) -> str:
    """One conversation, in this process; with ``asks`` up to where an answer begins."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template).render(
        messages=list(messages),
        add_generation_prompt=asks,
        bos_token=bos,
        eos_token=eos,
        tools=None,
        documents=None,
    )


def _text(tokens: MetaValue | None, number: MetaValue | None) -> str:
    """A special token's text."""
    if tokens is None or number is None or not 0 <= int(number.value) < len(tokens.value):
        return ""
    return str(tokens.value[int(number.value)])
