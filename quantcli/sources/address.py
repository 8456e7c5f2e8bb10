"""Addresses of files that are not on this machine, where paths are expected.

They have names, parents and suffixes as paths do and are shown with both slashes of their scheme;
nothing of the local disk is found under them.
"""

from __future__ import annotations

import re
from pathlib import Path

_COLLAPSED = re.compile(r"([a-z][a-z0-9+.-]+):/(?=[^/])")
_URL = re.compile(r"([a-z][a-z0-9+.-]+)://.+", re.DOTALL)


class Address(type(Path())):  # type: ignore[misc]
    """A file behind a scheme such as ``hf://`` or ``s3://``.

    ``mark`` tells its content from another version's, where whoever opened it could learn that;
    ``size`` are its bytes.
    """

    mark: str = ""
    size: int = 0

    def __str__(self) -> str:
        return _COLLAPSED.sub(r"\1://", super().__str__(), count=1)


def file_size(path: Path) -> int:
    """Bytes of an opened file, wherever it is."""
    return path.size if isinstance(path, Address) else path.stat().st_size


def is_remote(path: Path) -> bool:
    """Whether the file is somewhere else, so that each read is a request."""
    return isinstance(path, Address)
