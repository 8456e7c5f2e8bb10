"""Models of the Hub seen from afar: headers are read by ranges, weights stay where they are.

Looking at a model of 70 billion weights must not download 140 GB. The strict readers of the two
file forms work on a file that is read piece by piece over the network as they do on a local one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.sources.files import StoredFile
from quantcli.sources.gguf import GgufCheckpoint, open_gguf
from quantcli.sources.hub import HubRequest, explain_gap, explaining
from quantcli.sources.shards import SINGLE, Shards, open_shards, read_index

_FIRST_READ = 1 << 18
"""Bytes of the first request: the whole header of most shards, the start of any GGUF's."""

_CONNECTIONS = 8


class HubFile(StoredFile):
    """A file of a repository, of which only what is asked for is transferred."""

    is_remote = True

    def __init__(self, wanted: HubRequest, path: Path, name: str) -> None:
        from huggingface_hub import hf_hub_url

        self.path = path
        self._descriptor = -1
        self._wanted = wanted
        self._name = name
        self._url = hf_hub_url(wanted.repo, name, revision=wanted.revision)
        self._first, self.size = self._request(0, _FIRST_READ)

    def fill(self, target: NDArray[Any], offset: int) -> None:
        """Fill a C-contiguous array with the bytes at ``offset``; SourceError when they end."""
        view = target.reshape(-1).view(np.uint8)
        stop = offset + view.size
        if stop <= len(self._first):
            data = self._first[offset:stop]
        else:
            data, _ = self._request(offset, view.size)
        if len(data) != view.size:
            raise SourceError(
                f"{self.path}: {view.size} bytes at {offset} were asked for, {len(data)} came"
            )
        view[:] = np.frombuffer(data, np.uint8)

    def _request(self, offset: int, count: int) -> tuple[bytes, int]:
        """At most ``count`` bytes at ``offset``, and the file's size."""
        from huggingface_hub import constants
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        headers = build_hf_headers() | {
            "Range": f"bytes={offset}-{offset + count - 1}",
            "Accept-Encoding": "identity",
        }
        with explaining(self._wanted):
            try:
                answer = get_session().get(
                    self._url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
                )
                hf_raise_for_status(answer)
            except EntryNotFoundError as error:
                missing = f"the repository holds no {self._name}"
                raise explain_gap(self._wanted, missing) from error
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if answer.status_code != 206 or not total.isdecimal():
            raise SourceError(
                f"{self._wanted.label}: the server does not send {self._name} in parts",
                hint="download the model first: hf download " + self._wanted.repo,
            )
        return answer.content, int(total)


def open_remote_shards(folder: Path, repo: str, revision: str | None) -> Shards:
    """The weights of a checkpoint whose settings are in ``folder``.

    They are checked as those of a local one are, and can be listed; reading a row costs a request.
    SourceError when a header is broken or the Hub refuses it.
    """
    weight_map = read_index(folder, is_local=False)
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    opener = _opener(repo, revision, folder)
    with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="headers") as pool:
        files = dict(zip(names, pool.map(opener, (folder / name for name in names)), strict=True))
    return open_shards(folder, lambda path: files[path.name])


def open_remote_gguf(name: str, repo: str, revision: str | None) -> GgufCheckpoint:
    """A GGUF model of a repository, all shards of it; SourceError as `open_remote_shards`."""
    return open_gguf(Path(repo) / name, _opener(repo, revision, Path(repo)))


def _opener(repo: str, revision: str | None, root: Path) -> Callable[[Path], HubFile]:
    wanted = HubRequest(repo, revision, (), (), lambda _: None)
    return lambda path: HubFile(wanted, path, path.relative_to(root).as_posix())
