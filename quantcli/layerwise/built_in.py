"""The texts that come with quantcli, by kind, and the mix of them that a calibration takes.

`prose` is English of the nineteenth century and before. `languages` are 18 others: openings of
books in the public domain (Cervantes, Kafka, Voltaire, Collodi, Camões, Tolstoy, the Analects,
Sōseki), and paragraphs of our own. `chat` are conversations of our own, which the model's chat
template writes. `code` is a part of quantcli's own sources, Python, C and shell, and short pieces
in ten other languages, frozen so that calibrations stay as they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A kind: its file, what to call it, and its share in the mix."""

    file: str
    label: str
    share: float

    def read(self) -> str:
        """The file's text."""
        return files("quantcli.layerwise").joinpath(self.file).read_text(encoding="utf-8")

    def conversations(self) -> tuple[list[dict[str, str]], ...]:
        """The messages of each line."""
        return tuple(json.loads(line)["messages"] for line in self.read().splitlines())


KINDS = {
    "prose": BuiltIn("prose.txt", "built-in English prose", 6),
    "code": BuiltIn("code.txt", "built-in code", 2),
    "chat": BuiltIn("chat.jsonl", "built-in conversations", 1),
    "languages": BuiltIn("languages.txt", "built-in other languages", 1),
}
CONVERSATIONS = "chat"


def write_plainly(conversation: list[dict[str, str]]) -> str:
    """A conversation for a model that has no template: a paragraph for each message."""
    return "\n\n".join(f"{said['role'].title()}: {said['content']}" for said in conversation)
