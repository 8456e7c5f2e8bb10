"""What running a model costs whose weights are elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

from quantcli.model import Model
from quantcli.types import Note


def note_remote(model: Model) -> Iterator[Note]:
    """That each walk through the layers reads the weights over the network again."""
    if model.is_remote:
        yield Note(
            f"the weights of {model.label} come over the network in each walk through its layers; "
            "--download stores a model of the Hub first"
        )
