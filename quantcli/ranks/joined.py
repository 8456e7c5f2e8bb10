"""The ranks that this process has joined, for those who can do without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantcli.ranks.group import Group

_active: Group | None = None


def active_group() -> Group | None:
    """The ranks that this process has joined; see `quantcli.ranks.group.join`."""
    return _active


def set_active(group: Group | None) -> None:
    """From now on they are these."""
    global _active
    _active = group
