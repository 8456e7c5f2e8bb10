"""From what a user types to files on this machine.

A target is a folder, a file, ``org/name[@revision]``, ``hf://org/name[@revision][/file.gguf]`` or
an object store's address such as ``s3://bucket/folder``.
What exists locally wins; a target that looks like a path and does not exist is said to be missing
and never sent to the Hub, so that a typing error costs nothing. Of a repository only the files
that are needed are fetched: weights in safetensors, settings and the tokenizer, never ``.bin``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from quantcli.errors import SourceError
from quantcli.registry import near
from quantcli.sources.address import Address
from quantcli.sources.files import read_json
from quantcli.sources.gguf_header import gguf_type, is_gguf
from quantcli.sources.hub import HubRequest, OnEvent, find_cached, find_commit
from quantcli.sources.hub_download import fetch
from quantcli.sources.imatrix import is_legacy_importance
from quantcli.sources.remote_models import HubModel, RemoteModel
from quantcli.sources.shards import INDEX, SINGLE
from quantcli.sources.store import is_local_address, is_store, local_path
from quantcli.sources.store_ranges import MOST_SETTINGS, open_store_model
from quantcli.types import Event

SETTINGS_PATTERNS = (
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "spiece.model",
    "merges.txt",
    "vocab.txt",
    "README.md",
)
STREAMED_PATTERNS = ("[0-9]*_Dense/model.safetensors", *SETTINGS_PATTERNS)
"""What is stored of a model whose weights are read where they are."""
CHECKPOINT_PATTERNS = ("model*.safetensors", *STREAMED_PATTERNS)
CHECKPOINT_IGNORED = ("[!0-9]*/*.safetensors", "[!0-9]*/*.json")
"""Sub-folders hold other forms of the model (ONNX, the authors' own layout); those whose names
begin with a number are the stages of sentence-transformers, such as "1_Pooling"."""

_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_REPO = re.compile(rf"(?P<repo>{_NAME})(?:@(?P<revision>[\w.][\w./-]*))?")
_URI = re.compile(
    rf"hf://(?P<repo>{_NAME})(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(?P<file>.+))?"
)
_SHARD = re.compile(r"(?P<stem>.*-)\d{5}(?P<rest>-of-\d{5}\.gguf)")
_STORED_FILES = (".gguf", ".dat", ".imatrix")
_FILE_SUFFIXES = (".gguf", ".dat", ".imatrix", ".safetensors", ".bin", ".json")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A target on this machine.

    ``kind`` is "checkpoint" (``path`` is a folder), "gguf" or "imatrix". ``repo`` and
    ``revision`` (the commit) are set for what came from the Hub or lies in its cache.
    ``remote``: where the weights are still, which `quantcli.sources.remote` opens; the settings of
    a checkpoint are in ``path`` nevertheless, and a GGUF's ``path`` is an `Address`.
    """

    path: Path
    kind: str
    repo: str | None = None
    revision: str | None = None
    remote: RemoteModel | None = None

    @property
    def is_remote(self) -> bool:
        """Whether each read of weights is a request."""
        return self.remote is not None


def _ignore(_: Event) -> None:
    """Listen to nothing."""


def resolve(target: str, *, on_progress: OnEvent | None = None, weights: bool = True) -> Resolved:
    """Find ``target``; a download reports to ``on_progress``. SourceError says why it is not.

    ``weights=False`` downloads settings and tokenizer alone of what is not in the local cache.
    """
    if target.startswith("hf://"):
        return _from_uri(target, on_progress or _ignore, weights)
    if is_local_address(target):
        target = local_path(target)
    elif is_store(target):
        return _from_store(target, weights)
    path = Path(target).expanduser()
    if path.exists():
        return _local(path)
    match = _REPO.fullmatch(target)
    if match is None or target.endswith(_FILE_SUFFIXES) or path.parent.is_dir():
        raise _missing(target, path)
    return _checkpoint(match["repo"], match["revision"], on_progress or _ignore, weights)


def _local(path: Path) -> Resolved:
    repo, revision = _cache_origin(path)
    if path.is_dir():
        return Resolved(path, "checkpoint", repo, revision)
    if is_gguf(path):
        kind = "imatrix" if gguf_type(path) == "imatrix" else "gguf"
        return Resolved(path, kind, repo, revision)
    if path.suffix == ".safetensors":
        raise SourceError(
            f"{path}: is one file of a checkpoint",
            hint=f"name its folder: {path.parent}",
        )
    if is_legacy_importance(path):
        return Resolved(path, "imatrix", repo, revision)
    raise SourceError(
        f"{path}: is neither a GGUF file nor an importance matrix",
        hint="name a checkpoint folder, a .gguf file or org/name",
    )


def _cache_origin(path: Path) -> tuple[str | None, str | None]:
    """Repository and commit of a path inside the Hub's cache (models--org--name/snapshots/sha)."""
    places = path.absolute().parents if path.is_file() else (path.absolute(),)
    for folder in places:
        owner = folder.parent.parent.name
        if folder.parent.name == "snapshots" and owner.startswith("models--"):
            return owner.removeprefix("models--").replace("--", "/"), folder.name
    return None, None


def _missing(target: str, path: Path) -> SourceError:
    parent = path.parent
    siblings = [child.name for child in parent.iterdir()] if parent.is_dir() else []
    guesses = [str(parent / name) for name in near(path.name, siblings)]
    if guesses:
        hint = f"did you mean {' or '.join(guesses)}?"
    elif _REPO.fullmatch(target) and not target.endswith(_FILE_SUFFIXES):
        hint = f"the folder {parent} exists; for the Hub's repository: hf://{target}"
    elif target.startswith(("http://", "https://")):
        hint = "for a repository of the Hub, write org/name"
    else:
        hint = "a model is a folder, a .gguf file, org/name[@revision], hf://org/name or s3://..."
    return SourceError(f"{target}: there is no such file or folder", hint=hint)


def _from_uri(target: str, on_event: OnEvent, weights: bool) -> Resolved:
    match = _URI.fullmatch(target)
    if match is None:
        raise SourceError(
            f"{target}: is not a repository's address",
            hint="write hf://org/name, hf://org/name@revision or hf://org/name/file.gguf",
        )
    if match["file"] is None:
        return _checkpoint(match["repo"], match["revision"], on_event, weights)
    return _file(match["repo"], match["revision"], match["file"], on_event, weights)


def _from_store(target: str, weights: bool) -> Resolved:
    if target.endswith(".safetensors"):
        folder = target.rpartition("/")[0]
        raise SourceError(
            f"{target}: is one file of a checkpoint", hint=f"name its folder: {folder}"
        )
    if not target.endswith(_STORED_FILES):
        model = open_store_model(target)
        patterns = CHECKPOINT_PATTERNS if weights else STREAMED_PATTERNS
        found = model.copy_files(
            patterns, CHECKPOINT_IGNORED, most=None if weights else MOST_SETTINGS
        )
        if not (found / "config.json").exists():
            raise SourceError(f"{target}: holds no config.json, so it is not a checkpoint")
        return Resolved(found, "checkpoint", remote=None if weights else model)
    place, _, name = target.rpartition("/")
    model = open_store_model(place)
    if not weights and _is_model_file(name):
        return Resolved(Address(target), "gguf", remote=model)
    pattern = _SHARD.sub(lambda part: part["stem"] + "?????" + part["rest"], name)
    copied = model.copy_files((pattern,), ())
    if not (copied / name).exists():
        raise SourceError(f"{target}: there is no such object or bucket")
    return _local(copied / name)


def _is_model_file(name: str) -> bool:
    """Whether a file is a GGUF of a model; importance matrices are of use only as a whole."""
    return name.endswith(".gguf") and "imatrix" not in name.lower()


def _checkpoint(repo: str, revision: str | None, on_event: OnEvent, weights: bool) -> Resolved:
    wanted = HubRequest(repo, revision, CHECKPOINT_PATTERNS, CHECKPOINT_IGNORED, _lacks_weights)
    is_remote = not weights and find_cached(wanted) is None
    if is_remote:
        wanted = replace(wanted, patterns=STREAMED_PATTERNS, lacks=_lacks_config)
    # A cached config.json does not tell whether the index beside it is cached as well.
    folder = fetch(wanted, on_event, ask=is_remote)
    remote = HubModel(repo, folder.name) if is_remote else None
    return Resolved(folder, "checkpoint", repo, folder.name, remote)


def _file(repo: str, revision: str | None, name: str, on_event: OnEvent, weights: bool) -> Resolved:
    if not name.endswith((".gguf", ".dat", ".imatrix")) or ".." in Path(name).parts:
        raise SourceError(
            f"hf://{repo}/{name}: of single files only GGUF and importance matrices are read",
            hint=f"for the checkpoint: hf://{repo}",
        )
    # The other shards of a split model are needed as well.
    pattern = _SHARD.sub(lambda part: part["stem"] + "?????" + part["rest"], name)
    lacks: Callable[[Path], str | None] = partial(_lacks_file, name=name)
    wanted = HubRequest(repo, revision, (pattern,), (), lacks)
    if not weights and _is_model_file(name) and find_cached(wanted) is None:
        remote = HubModel(repo, find_commit(wanted, name))
        return Resolved(remote.root / name, "gguf", repo, remote.commit, remote)
    folder = fetch(wanted, on_event)
    found = _local(folder / name)
    return Resolved(found.path, found.kind, repo, folder.name)


def _lacks_config(folder: Path) -> str | None:
    if (folder / "config.json").exists():
        return None
    return "the repository holds no config.json, so it is not a checkpoint"


def _lacks_weights(folder: Path) -> str | None:
    missing_config = _lacks_config(folder)
    if missing_config is not None:
        return missing_config
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        # A broken index is a complete download; opening the checkpoint says what is wrong with it.
        shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        missing = sorted(shard for shard in shards if not (folder / shard).exists())
        return f"the repository lacks {missing[0]}, which its index names" if missing else None
    if not (folder / SINGLE).exists():
        return f"the repository holds no {SINGLE} and no {INDEX}"
    return None


def _lacks_file(folder: Path, name: str) -> str | None:
    return None if (folder / name).exists() else f"the repository holds no file {name}"
