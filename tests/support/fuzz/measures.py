"""What a process takes and leaves: memory, time, files."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every name below ``folder`` with what changes when its content does; links not followed."""
    found: dict[str, tuple[int, int, int]] = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = f"{root}/{name}"
            status = os.lstat(path)
            key = path.removeprefix(f"{folder}/").encode(errors="surrogateescape").decode("latin-1")
            is_folder = name in folders
            found[key] = (
                status.st_ino,
                0 if is_folder else status.st_size,
                0 if is_folder else status.st_mtime_ns,
            )
    return found


def remove(folder: Path) -> None:
    """Remove a folder whatever permissions its parts have."""
    for root, folders, _ in os.walk(folder):
        for name in folders:
            with suppress(OSError):
                Path(root, name).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def status(key: str) -> str:
    """A figure of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(key + ":"))


def waited(process: int) -> float:
    """Seconds in which a process's main thread could have run and no processor was free."""
    with suppress(OSError):
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def reset_memory() -> int:
    """Let the peak of resident memory begin anew; the bytes resident now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(status("VmRSS")) << 10


def peak() -> int:
    """The bytes that were resident at most since then."""
    return int(status("VmHWM")) << 10
