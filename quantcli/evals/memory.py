"""How much memory there is to work in."""

from __future__ import annotations

from pathlib import Path

from quantcli.systems import machine_memory

_MEMINFO = Path("/proc/meminfo")


def available() -> int:
    """Bytes that can be taken without swapping: the kernel's estimate, or half of the memory."""
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return machine_memory() // 2
