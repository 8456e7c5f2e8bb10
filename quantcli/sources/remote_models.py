"""Where the weights of a model are that is not on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from quantcli.sources.address import Address
from quantcli.sources.hub import HubRequest
from quantcli.sources.hub_ranges import HubRanges
from quantcli.sources.remote_file import Place, RemoteFile


class RemoteModel(Protocol):
    """Where the weights of one model are."""

    @property
    def root(self) -> Address:
        """What its files' names are added to."""

    def open_file(self, path: Address, place: Place) -> RemoteFile:
        """One of its files; SourceError where it is not there or may not be read."""


@dataclass(frozen=True, slots=True)
class HubModel:
    """A commit of a repository of the Hub."""

    repo: str
    commit: str

    @property
    def root(self) -> Address:
        """``hf://org/name@commit``."""
        return Address(f"hf://{self.repo}@{self.commit}")

    def open_file(self, path: Address, place: Place) -> RemoteFile:
        """See `RemoteModel`."""
        name = path.relative_to(self.root).as_posix()
        wanted = HubRequest(self.repo, self.commit, (), (), lambda _: None)
        return RemoteFile(path, HubRanges(wanted, name, path, place.patience), place)
