"""Where the files of a run lie until its outputs are whole: beside them, or where one says."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from quantcli.artifacts.staging import HELD
from quantcli.errors import OutputError


def work_path(output: Path, scratch: Path | None) -> Path:
    """The path beside which the run that makes ``output`` works, in folders named after it.

    In ``scratch`` the name has a digest of the output's whole path, so that the same command finds
    its work again and outputs of one name in two folders do not meet.
    """
    if scratch is None:
        return output
    place = hashlib.sha256(os.fsencode(output.absolute())).hexdigest()[:12]
    return scratch / f"{output.name}-{place}"


def check_scratch(scratch: Path) -> None:
    """OutputError unless ``scratch`` is a folder that takes files."""
    if not scratch.is_dir():
        what = "is no folder" if scratch.exists() else "does not exist"
        raise OutputError(f"--scratch {scratch} {what}", hint="name a folder that is there")
    if not os.access(scratch, os.W_OK | os.X_OK):
        raise OutputError(
            f"--scratch {scratch} cannot be written to", hint="name a folder that can"
        )


def used_bytes(work: Path) -> int:
    """Bytes of the files that earlier runs at `work_path` ``work`` have left there.

    What they have filled of the output itself does not count.
    """
    total = 0
    for folder in work.parent.glob(f".{_quoted(work.name)}.*"):
        if folder.name.endswith(HELD):
            continue
        if folder.is_dir() and not folder.is_symlink():
            total += folder_bytes(folder)
    return total


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder, as far as they are still there; 0 where it is not."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(place, name).lstat().st_size
    return total


def _quoted(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
