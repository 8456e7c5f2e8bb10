"""``--to card``: a model card beside a GGUF, ``NAME.md``; and the facts of any artifact's card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from quantcli.errors import SourceError
from quantcli.exports.outcome import Exported
from quantcli.exports.targets import Prepared, Wish
from quantcli.exports.verify import stored_keys
from quantcli.model import Model, open_model
from quantcli.report.card import Card, read_evaluation, render_card
from quantcli.report.units import count_text, size_text
from quantcli.sources.resolve import Resolved
from quantcli.types import Event, MetaValue
from quantcli.writers.atomic import AtomicFiles, refuse_existing


def prepare(found: Resolved, label: str, wish: Wish, stack: ExitStack) -> Prepared:
    """Decide a card for a GGUF."""
    if found.kind != "gguf":
        raise SourceError(f"{label} is no GGUF", hint="folders get their card when they are made")
    path = wish.output or card_beside(found.path)
    if wish.check:
        refuse_existing([path], force=wish.force)
    if wish.evaluation is not None:
        read_evaluation(wish.evaluation)

    def run() -> Iterator[Event]:
        yield Exported((path,), write_card(found.path, path, wish))

    return Prepared((path,), 0, "a model card", run)


def card_beside(gguf: Path) -> Path:
    """``NAME.md`` beside the GGUF."""
    return gguf.with_name(f"{gguf.name.removesuffix('.gguf')}.md")


def write_card(gguf: Path, path: Path, wish: Wish) -> int:
    """Write the card of ``gguf`` to ``path``; returns its size in bytes."""
    with open_model(gguf) as model:
        usage = f"llama-cli -m {gguf.name}"
        content = render_card(gguf_card(model, gguf.stem, usage, wish.evaluation)).encode()
    with AtomicFiles({path: len(content)}, force=wish.force) as files:
        files.write(path, 0, content)
        files.publish()
    return len(content)


def gguf_card(model: Model, name: str, usage: str, evaluation: Path | None = None) -> Card:
    """The card of a GGUF: its size, its types, its recipe and where it came from."""
    elements = sum(tensor.elements for tensor in model.tensors)
    stored = sum(model.stored_bytes(tensor) for tensor in model.tensors)
    facts = [
        ("size", size_text(stored)),
        ("bits per weight", f"{8 * stored / max(1, elements):.2f}"),
        ("tensors", types_text(model)),
    ]
    return make_card(model, name, "gguf", facts, usage, evaluation)


def make_card(
    model: Model,
    name: str,
    library: str,
    facts: Sequence[tuple[str, str]],
    usage: str,
    evaluation: Path | None,
) -> Card:
    """The card of what was made of the GGUF ``model``; ``facts`` follow what the model is."""
    keys = stored_keys(model)
    elements = sum(tensor.elements for tensor in model.tensors)
    matrix = plain(keys, "quantize.imatrix.file")
    return Card(
        name=name,
        library=library,
        base_model=base_model(keys),
        license=plain(keys, "general.license"),
        languages=languages(keys),
        tags=("gguf",) if library == "gguf" else (),
        facts=[
            ("architecture", model.arch),
            ("parameters", count_text(elements)),
            *facts,
            *([("importance matrix", matrix)] if matrix else []),
        ],
        recipe=plain(keys, "quantcli.recipe"),
        usage=usage,
        evaluation=read_evaluation(evaluation) if evaluation else {},
    )


def types_text(model: Model) -> str:
    """How many tensors there are of each type: "24 x Q4_K, 9 x F32"."""
    types = Counter(tensor.dtype for tensor in model.tensors)
    return ", ".join(f"{count} x {kind}" for kind, count in types.most_common())


def base_model(keys: Mapping[str, MetaValue]) -> str | None:
    """The repository that quantcli read, else the base model that the key-values name."""
    named = plain(keys, "quantcli.source.repo")
    if named:
        return named
    link = plain(keys, "general.base_model.0.repo_url")
    if link and link.startswith("https://huggingface.co/"):
        return link.removeprefix("https://huggingface.co/")
    return plain(keys, "general.name")


def languages(keys: Mapping[str, MetaValue]) -> list[str]:
    """The model's languages."""
    found: Any = keys.get("general.languages")
    return [str(item) for item in found.value] if found is not None else []


def plain(keys: Mapping[str, MetaValue], key: str) -> str | None:
    """A text among the key-values."""
    found = keys.get(key)
    return None if found is None else str(found.value)
