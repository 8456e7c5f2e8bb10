"""``--to card``: a model card beside a GGUF (``NAME.md``) or in a folder; any artifact's facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from quantcli.artifacts.atomic import refuse_existing, refuse_own, write_file
from quantcli.artifacts.atomic_folder import MANIFEST
from quantcli.artifacts.model_card import Card, fence, format_table, render_card
from quantcli.artifacts.write import ArtifactDone
from quantcli.errors import SourceError
from quantcli.exports.targets import ExportOptions, Prepared
from quantcli.exports.verify import stored_keys
from quantcli.layouts import find_layout
from quantcli.model import Model, open_model
from quantcli.report.measured_quality import describe_evaluation, read_evaluation
from quantcli.report.units import count_text, size_text
from quantcli.sources.card import CARD
from quantcli.sources.files import read_json
from quantcli.sources.resolve import Resolved
from quantcli.types import Event, MetaValue, text

_HUB = "https://huggingface.co/"


def prepare(found: Resolved, label: str, options: ExportOptions, stack: ExitStack) -> Prepared:
    """Decide a card for a GGUF, or for a folder that quantcli made, in place of its own."""
    if found.kind == "imatrix" or (found.path.is_dir() and not (found.path / MANIFEST).is_file()):
        raise SourceError(f"{label} is no GGUF, and no folder that quantcli made")
    path = options.output or card_beside(found.path)
    if options.check:
        refuse_own([path], [found.path])
        refuse_existing([path], force=options.force)

    def run() -> Iterator[Event]:
        yield ArtifactDone((path,), write_card(found.path, path, options))

    return Prepared((path,), 0, "a model card", run)


def card_beside(artifact: Path) -> Path:
    """``NAME.md`` beside a GGUF, README.md in a folder."""
    if artifact.is_dir():
        return artifact / CARD
    return artifact.with_name(f"{artifact.name.removesuffix('.gguf')}.md")


def write_card(artifact: Path, path: Path, options: ExportOptions) -> int:
    """Write the card of a GGUF or a folder to ``path``; returns its size in bytes."""
    with open_model(artifact, vocabulary=False) as model:
        to = "gguf" if model.from_gguf else str(read_json(artifact / MANIFEST).get("to"))
        name = artifact.resolve().name.removesuffix(".gguf")
        usage = usage_text(to, artifact.resolve().name)
        library = "gguf" if to == "gguf" else find_layout(to).library
        card = make_card(model, name, library, _size_facts(model), usage, options.evaluation)
        content = render_card(card)
    write_file(path, content, force=options.force)
    return len(content)


def usage_text(to: str, name: str) -> str:
    """A line that runs the artifact ``name`` of the format ``to``."""
    if to == "gguf":
        return f"llama-cli -m {name}"
    return find_layout(to).usage(name)


def _size_facts(model: Model) -> list[tuple[str, str]]:
    """What an artifact weighs, and its tensors' types."""
    elements = sum(tensor.elements for tensor in model.tensors)
    stored = sum(model.stored_bytes(tensor) for tensor in model.tensors)
    return [
        ("size", size_text(stored)),
        ("bits per weight", f"{8 * stored / max(1, elements):.2f}"),
        ("tensors", types_text(model)),
    ]


def make_card(
    model: Model,
    name: str,
    library: str,
    facts: Sequence[tuple[str, str]],
    usage: str,
    evaluation: Path | None,
) -> Card:
    """The card of ``model``, or of what is made of it; ``facts`` follow what the model is."""
    keys = recorded_keys(model)
    elements = sum(tensor.elements for tensor in model.tensors)
    matrix = plain(keys, "quantize.imatrix.file")
    facts = [
        ("architecture", model.arch),
        ("parameters", count_text(elements)),
        *facts,
        *([("importance matrix", matrix)] if matrix else []),
    ]
    base, license_id, spoken = base_model(keys), plain(keys, "general.license"), languages(keys)
    is_repo = base is not None and "/" in base
    tags = ["gguf"] if library == "gguf" else []
    front: dict[str, Any] = {
        "base_model": base if is_repo else None,
        "base_model_relation": "quantized" if is_repo else None,
        "language": spoken,
        "library_name": library,
        "license": license_id,
        "tags": [*tags, "quantcli"],
    }
    # A blank line lies between the front matter and the title.
    paragraphs = [f"\n# {name}"]
    if base:
        shown = f"[{base}]({_HUB}{base})" if is_repo else base
        paragraphs.append(f"Made from {shown} with quantcli.")
    paragraphs.append(format_table(("", ""), facts))
    if evaluation:
        paragraphs += ["## Measured", describe_evaluation(read_evaluation(evaluation))]
    paragraphs += ["## Use", fence(usage)]
    recipe = plain(keys, "quantcli.recipe")
    if recipe:
        paragraphs += ["## Recipe", fence(recipe.strip(), "toml")]
    return Card({key: value for key, value in front.items() if value}, paragraphs)


def recorded_keys(model: Model) -> Mapping[str, MetaValue]:
    """All key-values of a GGUF; of a folder its model's, with what quantcli.json records."""
    manifest = model.path / MANIFEST
    if model.from_gguf:
        return stored_keys(model)
    if not manifest.is_file():
        return model.metadata
    found = read_json(manifest)
    source = found.get("source")
    repo = source.get("repo") if isinstance(source, dict) else None
    more = {"quantcli.recipe": found.get("recipe"), "quantcli.source.repo": repo}
    return {**model.metadata, **{k: text(v) for k, v in more.items() if isinstance(v, str)}}


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
    if link and link.startswith(_HUB):
        return link.removeprefix(_HUB)
    return plain(keys, "general.name")


def languages(keys: Mapping[str, MetaValue]) -> list[str]:
    """The model's languages."""
    found: Any = keys.get("general.languages")
    return [str(item) for item in found.value] if found and found.kind == "[str]" else []


def plain(keys: Mapping[str, MetaValue], key: str) -> str | None:
    """A text among the key-values."""
    found = keys.get(key)
    return None if found is None else str(found.value)
