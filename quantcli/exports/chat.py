"""What a chat template writes around the messages of a conversation, found by rendering it.

A Jinja template is a program, and other runtimes have other template languages. Most templates do
one simple thing, though: fixed text before the system's, the user's and the assistant's words. So
the template renders conversations of marked words, the text between the marks is read off, and
whether that text explains the template is tried on further conversations. A template that does
more (that depends on the date, rearranges messages or trims others' words) is not explained.

Templates come out of files that anybody made, so they run in Jinja's sandbox, and in a child
process with limits of time and memory, which the sandbox does not set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantcli.bounded import BoundError, call_bounded
from quantcli.vocab.chat_template import render

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_MARKS = {
    SYSTEM: ("Sysα0",),
    USER: ("Userα1", "Userα2", "Userα3"),
    ASSISTANT: ("Botα1", "Botα2"),
}
_CHANGING = ("strftime_now", "date_string")
"""What a template calls the day of the rendering."""
_SECONDS = 5.0
_MEMORY = 1 << 30


@dataclass(frozen=True, slots=True)
class ChatText:
    """The fixed text of a conversation.

    ``first``, ``after_system`` and ``after_assistant`` stand before a user's words, by what was
    said before them; ``answer`` follows them and asks for the answer; ``system`` stands before the
    system's words and ``reply`` before an assistant's that is already there.
    """

    system: str
    first: str
    after_system: str
    after_assistant: str
    answer: str
    reply: str
    takes_system: bool = True

    def write(self, messages: Sequence[tuple[str, str]]) -> str:
        """A conversation of (role, words), up to where the assistant answers."""
        before = {"": self.first, SYSTEM: self.after_system, ASSISTANT: self.after_assistant}
        text, last = "", ""
        for role, words in messages:
            if role == SYSTEM:
                text += self.system + words
            elif role == USER:
                text += before[last] + words + self.answer
            else:
                text += self.reply + words
            last = role
        return text

    @property
    def pieces(self) -> tuple[str, ...]:
        """All fixed text."""
        return (
            self.system, self.first, self.after_system, self.after_assistant, self.answer,
            self.reply,
        )  # fmt: skip


def explain_template(
    template: str, *, bos: str = "", eos: str = "", adds_bos: bool = True
) -> ChatText | None:
    """The fixed text of a Jinja ``template``; None where that does not explain it.

    ``bos`` and ``eos`` are the tokens' texts. With ``adds_bos`` the runtime begins every text with
    BOS by itself, so the first one is left out.
    """
    if any(word in template for word in _CHANGING):
        return None
    question = {"template": template, "bos": bos, "eos": eos, "adds_bos": adds_bos}
    try:
        found = call_bounded(
            "quantcli.exports.chat:answer", question, seconds=_SECONDS, memory=_MEMORY
        )
    except BoundError:
        # A simple template is rendered in no time.
        return None
    return None if found is None else ChatText(**found)


def answer(question: Mapping[str, Any]) -> dict[str, Any] | None:
    """The child's part: the fields of the explanation."""
    found = _explain(**question)
    return None if found is None else asdict(found)


def render_prompt(template: str, words: str, *, bos: str = "", eos: str = "") -> str | None:
    """What a Jinja ``template`` makes of a user's first words, up to where the answer begins.

    None where the template fails or takes too long.
    """
    question = {"template": template, "words": words, "bos": bos, "eos": eos}
    try:
        found = call_bounded(
            "quantcli.exports.chat:ask", question, seconds=_SECONDS, memory=_MEMORY
        )
    except BoundError:
        return None
    return found if isinstance(found, str) else None


def ask(question: Mapping[str, str]) -> str | None:
    """The child's part: the rendered conversation."""
    try:
        return _render(
            question["template"], [(USER, question["words"])], question["bos"], question["eos"]
        )
    except Exception:
        # Whatever a stranger's program stumbles over, there is no prompt then.
        return None


def _explain(template: str, bos: str, eos: str, adds_bos: bool) -> ChatText | None:
    strip = bos if adds_bos else ""

    def render(*roles: str) -> str:
        return _render(template, _conversation(roles), bos, eos).removeprefix(strip)

    try:
        whole = _between(render(USER, ASSISTANT, USER), USER, ASSISTANT, USER)
        if not whole[1].startswith(whole[3]):
            return None
        system = _system_text(render, whole[0])
        found = ChatText(
            system=system[0],
            first=whole[0],
            after_system=system[1],
            after_assistant=whole[2],
            answer=whole[3],
            reply=whole[1].removeprefix(whole[3]),
            takes_system=system[2],
        )
        chats: list[tuple[str, ...]] = [(USER,), (USER, ASSISTANT, USER, ASSISTANT, USER)]
        if found.takes_system:
            chats += [(SYSTEM, USER), (SYSTEM, USER, ASSISTANT, USER)]
        good = all(found.write(_conversation(chat)) == render(*chat) for chat in chats)
    except Exception:
        # Whatever a stranger's program stumbles over, it is not of the simple kind.
        return None
    return found if good else None


def _conversation(roles: Sequence[str]) -> list[tuple[str, str]]:
    marks = {role: iter(words) for role, words in _MARKS.items()}
    return [(role, next(marks[role])) for role in roles]


def _between(text: str, *roles: str) -> list[str]:
    """The text before, between and after the marks; ValueError where their order is another."""
    parts = []
    for _, mark in _conversation(roles):
        before, found, text = text.partition(mark)
        if not found:
            raise ValueError(mark)
        parts.append(before)
    return [*parts, text]


def _system_text(render: Any, first: str) -> tuple[str, str, bool]:
    """Text before the system's words and before the user's after them, and if it takes any."""
    from jinja2 import TemplateError

    try:
        before, between, _ = _between(render(SYSTEM, USER), SYSTEM, USER)
    except (TemplateError, ValueError):
        # Such models are told what a system would say at the beginning of the first words.
        return first, "\n\n", False
    return before, between, True


def _render(template: str, messages: Sequence[tuple[str, str]], bos: str, eos: str) -> str:
    said = [{"role": role, "content": words} for role, words in messages]
    return render(template, said, bos, eos, asks=True)
