"""The ``general.*`` key-values: what the model is called, whose it is, what it was made from.

They come from the model card's front matter, config.json, generation_config.json and the folder's
or repository's name, by the heuristics of the ``gguf`` package, which llama.cpp's converter uses
too; they are called and not written again, so both tools say the same of the same model. Absent
are the keys that only the writer of a file can know: architecture, file type and version.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quantcli.bounded_yaml import load_yaml
from quantcli.errors import SourceError
from quantcli.formats.container import ARRAY_CODE, VALUE_KINDS
from quantcli.sources.files import read_json
from quantcli.types import MetaValue, OutputTensor, text
from quantcli.whole_files import read_whole_text

_LARGEST = 3.4028234663852886e38
"""Of float32."""
CARD, GENERATION = "README.md", "generation_config.json"
_SAMPLING_NAMES = {
    "temp": ("temperature",),
    "penalty_repeat": ("penalty_repeat", "repetition_penalty"),
}
"""GGUF's name of a sampling parameter -> generation_config.json's, where they differ."""


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """How many weights a model has: in all, outside of experts, in one expert, and experts."""

    total: int
    shared: int
    expert: int
    experts: int


def count_parameters(tensors: Iterable[OutputTensor]) -> ParameterCount:
    """Weights of a model from its GGUF tensors; stacks of experts have ``_exps.`` in their name."""
    total = shared = expert = 0
    stacks: list[int] = []
    for tensor in tensors:
        size = math.prod(tensor.shape)
        total += size
        if "_exps." in tensor.name and len(tensor.shape) >= 3:
            experts = tensor.shape[-3]
            stacks.append(experts)
            expert += size // max(1, experts)
        else:
            shared += size
    return ParameterCount(total, shared, expert, sum(stacks) // len(stacks) if stacks else 0)


def general_metadata(
    folder: Path,
    *,
    config: Mapping[str, Any],
    parameters: ParameterCount | int,
    name: str | None = None,
    on_note: Callable[[str], None] | None = None,
) -> dict[str, MetaValue]:
    """The ``general.*`` key-values of the checkpoint in ``folder``, in the converter's order.

    ``parameters`` is the number of weights, with its parts where there are experts. ``name`` is
    the repository (org/name) or a name of the user's choice; without it the folder's name counts.
    A card that cannot be read costs the keys that it would give, and ``on_note`` takes a sentence
    about it. SourceError when generation_config.json is broken.
    """
    from gguf import GGUFType, GGUFWriter
    from gguf.metadata import Metadata
    from gguf.utility import size_label

    counted = (
        ParameterCount(parameters, parameters, 0, 0) if isinstance(parameters, int) else parameters
    )
    folder = folder.resolve()
    known = dict(config)
    if name is not None and "/" in name:
        known["_name_or_path"] = name
    label = Path(name) if name is not None else folder
    card = _read_card(folder, on_note)
    found = Metadata.apply_metadata_heuristic(Metadata(), card, known, label, counted.total)
    if name is not None and "/" not in name:
        found.name = name
    if found.name is None:
        found.name = folder.name
    if found.size_label is None and counted.total > 0:
        found.size_label = size_label(
            counted.total, counted.shared, counted.expert, counted.experts
        )
    _take_sampling(found, folder)
    _make_text(found)
    writer = GGUFWriter(None, "")
    found.set_gguf_meta_model(writer)
    written = writer.kv_data[0].items()
    keys = {"general.type": text(str(GGUFType.MODEL))}
    return keys | {
        key: _as_meta(key, int(value.type), value.value, folder)
        for key, value in written
        if key != "general.architecture"
    }


def _read_card(folder: Path, on_note: Callable[[str], None] | None) -> dict[str, Any]:
    """The front matter, read as the converter does but within bounds."""
    if not (folder / CARD).is_file():
        return {}
    try:
        lines = read_whole_text(folder / CARD).splitlines()
        if lines[:1] != ["---"]:
            return {}
        front = "\n".join([*itertools.takewhile(lambda line: line != "---", lines[1:]), ""])
        # The code of Norwegian is no truth value, and tabs are common though YAML has none.
        found = load_yaml(front.replace("- no\n", '- "no"\n').replace("\t", "  "))
        return found if isinstance(found, dict) else {}
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}"
    except OSError as error:
        reason = f"it cannot be read: {error.strerror}"
    except ValueError as error:
        reason = f"the front matter is not YAML: {error}"
    if on_note is not None:
        on_note(f"{folder / CARD}: {reason}; nothing is taken from the model card")
    return {}


def _take_sampling(found: Any, folder: Path) -> None:
    """Recommended sampling parameters of generation_config.json, into the metadata's fields."""
    path = folder / GENERATION
    if not path.exists():
        return
    settings = read_json(path)
    for slot in fields(found):
        if slot.name.startswith("sampling_"):
            name = slot.name.removeprefix("sampling_")
            for key in _SAMPLING_NAMES.get(name, (name,)):
                if settings.get(key) is not None:
                    setattr(found, slot.name, settings[key])
                    break


def _make_text(found: Any) -> None:
    """Turn what YAML took for numbers, dates or truth values back into text."""
    for slot in fields(found):
        value = getattr(found, slot.name)
        if slot.name.startswith("sampling_") or value is None:
            continue
        if slot.name in ("base_models", "datasets"):
            cleaned: Any = [
                {key: str(entry) for key, entry in item.items() if entry is not None}
                for item in value
            ]
        elif isinstance(value, list):
            cleaned = [str(item) for item in value if item is not None]
        else:
            cleaned = str(value)
        setattr(found, slot.name, cleaned)


def _as_meta(key: str, code: int, value: Any, folder: Path) -> MetaValue:
    if code == ARRAY_CODE:
        return MetaValue("[str]", [_whole(key, item, folder) for item in value])
    kind = VALUE_KINDS[code]
    if kind == "str":
        return text(_whole(key, value, folder))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = is_number and abs(value) <= _LARGEST
    if not fits or not math.isfinite(value) or (kind != "f32" and value != int(value)):
        raise SourceError(
            f"{folder / GENERATION}: the value for {key} is {value!r}; a number belongs there"
        )
    return MetaValue(kind, float(value) if kind == "f32" else int(value))


def _whole(key: str, value: str, folder: Path) -> str:
    """The text, unless it has a surrogate that stands for no byte of a file's name."""
    if any("\ud800" <= c <= "\udfff" and not "\udc80" <= c <= "\udcff" for c in value):
        raise SourceError(f"{folder / CARD}: the value for {key} has half a surrogate pair")
    return value
