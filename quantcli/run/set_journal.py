"""Which outputs of a set are whole: what an interrupted set leaves beside them.

The journal is a file next to the first output, ``.quantcli-set-XXXXXXXX.json`` (after the outputs'
names), from the first output that is whole to the last. It says of which model, recipes and texts
they were made, and what each file's size and date are; a set with any of these changed is not
continued. Model folders count by their manifest. What is left of unfinished outputs lies with them
(`quantcli.artifacts.kept_slabs`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantcli import __version__
from quantcli.artifacts.atomic import Stamps, stamp, write_file
from quantcli.artifacts.atomic_folder import MANIFEST
from quantcli.artifacts.fingerprint import fingerprint
from quantcli.errors import SourceError
from quantcli.model import Model
from quantcli.plan.recipe_file import dump_recipe
from quantcli.run.request import Request


class SetJournal:
    """What is whole of a set, by the name of its first file."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.identity = identity
        self._whole: dict[str, dict[str, Any]] = {}

    def read(self) -> None:
        """Take up what an interrupted run has left; SourceError where it was another set."""
        try:
            found = json.loads(self.path.read_text())
            identity, whole = found["identity"], dict(found["whole"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as broken:
            raise SourceError(f"{self.path} is damaged", hint="--force starts anew") from broken
        if identity != self.identity:
            raise SourceError(
                f"{self.path} is of a set with another model, text or other options",
                hint="--resume takes the same command; --force starts anew",
            )
        self._whole = whole

    def is_whole(self, path: Path) -> bool:
        """Whether the output whose first file is ``path`` was finished, and is as it was."""
        noted = self._whole.get(path.name)
        return noted is not None and noted["files"] == {
            name: _stamp(path.with_name(name)) for name in noted["files"]
        }

    def digest_of(self, path: Path) -> str | None:
        """The digest of the source that a whole output was made with."""
        digest: str | None = self._whole[path.name]["digest"]
        return digest

    def add(self, first: str, stamps: Stamps, digest: str | None = None) -> None:
        """An output is whole: its first file's (or its folder's) name, and what all are known by.

        It may get its name a moment later; until then it does not count.
        """
        self._whole[first] = {"files": stamps, "digest": digest}
        body = {"schema": "quantcli.set/1", "identity": self.identity, "whole": self._whole}
        write_file(self.path, json.dumps(body).encode(), force=True)

    def remove(self) -> None:
        """The set is whole, or begun anew."""
        self.path.unlink(missing_ok=True)


def open_journal(request: Request, model: Model, paths: Sequence[Path]) -> SetJournal:
    """The journal of a set whose outputs are ``paths``, with ``resume`` read.

    A run without it begins anew: that nothing is replaced, the outputs' own checks see to.
    """
    names = "\n".join(path.name for path in paths)
    mark = hashlib.sha256(names.encode()).hexdigest()[:8]
    journal = SetJournal(
        paths[0].with_name(f".quantcli-set-{mark}.json"), _identify(request, model)
    )
    if request.resume:
        journal.read()
    return journal


def _identify(request: Request, model: Model) -> str:
    """A digest of all that decides the outputs."""
    recipes = [wanted.recipe for wanted in request.outputs]
    named = {
        name
        for recipe in recipes
        for name in (recipe.imatrix, recipe.chat_template, recipe.statistics)
        if name
    }
    facts = {
        "version": __version__,
        "model": fingerprint(model),
        "recipes": [dump_recipe(recipe) for recipe in recipes],
        "files": {name: digest_file(Path(name)) for name in sorted(named | set(request.texts))},
        "chunks": request.chunks,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def digest_file(path: Path) -> str | None:
    """SHA-256 of a file; None where it is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> list[int]:
    return stamp(path / MANIFEST if path.is_dir() else path)
