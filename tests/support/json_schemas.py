"""JSON Schemas of what `--json` prints: inferred from documents, and held against documents.

Every document that a test prints is checked. With QUANTCLI_DOCUMENTS=FOLDER they are kept there
instead, and `scripts/make-schemas FOLDER` infers the schemas from them: keys that all documents of
a kind have are required, and new ones may come without a new version.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

FOLDER = Path(__file__).parents[2] / "docs" / "schemas"
COLLECT = "QUANTCLI_DOCUMENTS"
_MAPS = {"metadata", "packages", "quantiles", "files", "values"}
"""Objects whose keys are data: types, key-values, names of files."""
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def check_document(kind: str, version: int, document: Mapping[str, Any]) -> None:
    """Hold a document against its schema, or keep it where documents are collected."""
    plain = json.loads(json.dumps(document, allow_nan=False))
    folder = os.environ.get(COLLECT)
    if folder:
        with (Path(folder) / f"{kind}-{version}-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(plain) + "\n")
        return
    if not schema_path(kind, version).exists():
        return  # a document of a test's own; that each command has a schema is tested by itself
    errors = [
        f"{error.json_path}: {error.message[:300]}"
        for error in _validator(kind, version).iter_errors(plain)
    ]
    assert not errors, f"quantcli.{kind}/{version}: {errors[:3]} (run scripts/make-schemas)"


def schema_path(kind: str, version: int) -> Path:
    """Where the schema of a kind of document is."""
    return FOLDER / f"quantcli.{kind}-{version}.json"


@cache
def _validator(kind: str, version: int) -> Draft202012Validator:
    schema = json.loads(schema_path(kind, version).read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def infer_schema(kind: str, version: int, documents: Sequence[Any]) -> dict[str, Any]:
    """The schema of all documents of a kind."""
    name = f"quantcli.{kind}/{version}"
    found = _infer(documents, "")
    found["properties"]["schema"] = {"const": name}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": name, **found}


def _infer(values: Iterable[Any], name: str) -> dict[str, Any]:
    values = list(values)
    objects = [each for each in values if isinstance(each, dict)]
    arrays = [each for each in values if isinstance(each, list)]
    kinds = {_TYPES[type(each)] for each in values if type(each) in _TYPES}
    if {"integer", "number"} <= kinds:
        kinds.discard("integer")
    kinds |= {"object"} if objects else set()
    kinds |= {"array"} if arrays else set()
    found: dict[str, Any] = {"type": sorted(kinds)} if len(kinds) != 1 else {"type": kinds.pop()}
    if objects and name in _MAPS:
        inside = [value for each in objects for value in each.values()]
        # Here all packages are installed.
        inside += [None] if name == "packages" else []
        found["additionalProperties"] = _infer(inside, "") if inside else True
    elif objects:
        keys = sorted({key for each in objects for key in each})
        found["properties"] = {
            key: _infer([each[key] for each in objects if key in each], key) for key in keys
        }
        found["required"] = [key for key in keys if all(key in each for each in objects)]
    inside = [value for each in arrays for value in each]
    if inside:
        found["items"] = _infer(inside, name)
    return found


def read_documents(folder: Path) -> dict[tuple[str, int], list[Any]]:
    """What was collected, by kind and version."""
    found: dict[tuple[str, int], list[Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        match = re.fullmatch(r"(.+)-(\d+)-\d+", path.stem)
        assert match is not None
        lines = map(json.loads, path.read_text().splitlines())
        found.setdefault((match[1], int(match[2])), []).extend(lines)
    return found
