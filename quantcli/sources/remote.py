"""Models that are read where they are: headers, and whatever of the weights is asked for.

Looking at a model of 70 billion weights must not download 140 GB, and quantizing it need not store
them. The strict readers of the two file forms work on a file that is read piece by piece over the
network as they do on a local one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quantcli.sources.address import Address
from quantcli.sources.gguf import GgufCheckpoint, open_gguf
from quantcli.sources.hf import HfCheckpoint, hold_shards
from quantcli.sources.remote_file import CONNECTIONS, Place
from quantcli.sources.remote_models import RemoteModel
from quantcli.sources.resolve import Resolved
from quantcli.sources.shards import SINGLE, Shards, open_shards, read_index


def open_found_shards(found: Resolved) -> Shards:
    """The weights of a checkpoint, wherever they are; see `open_shards`."""
    if found.remote is not None:
        return open_remote_shards(found.path, found.remote)
    return open_shards(found.path)


def open_found_checkpoint(found: Resolved) -> HfCheckpoint:
    """A checkpoint, wherever it is; see `quantcli.sources.hf.open_checkpoint`."""
    return hold_shards(found.path, open_found_shards(found))


def open_found_gguf(found: Resolved) -> GgufCheckpoint:
    """A GGUF model, wherever it is; see `open_gguf`."""
    if found.remote is not None:
        return open_remote_gguf(Address(found.path), found.remote)
    return open_gguf(found.path)


def open_remote_shards(folder: Path, remote: RemoteModel) -> Shards:
    """The weights of a checkpoint whose settings are in ``folder``.

    They are checked as those of a local one are. SourceError when a header is broken or refused.
    """
    weight_map = read_index(folder, is_local=False)
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    place = Place(remote)
    try:
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="headers") as pool:
            opened = pool.map(lambda name: remote.open_file(remote.root / name, place), names)
            files = dict(zip(names, opened, strict=True))
        return open_shards(folder, lambda path: files[path.name])
    except BaseException:
        place.close()
        raise


def open_remote_gguf(path: Address, remote: RemoteModel) -> GgufCheckpoint:
    """A GGUF model, all shards of it; SourceError as `open_remote_shards`."""
    place = Place(remote)
    try:
        return open_gguf(path, lambda each: remote.open_file(Address(each), place))
    except BaseException:
        place.close()
        raise
