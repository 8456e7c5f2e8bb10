"""Sizes as people write them: 2G, 500M, 300000."""

from __future__ import annotations

import re

from quantcli.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(size: str) -> int:
    """Bytes in "2G", "500M", "1.5G" or "300000"; units are decimal. UsageError otherwise."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", size.strip().upper())
    nbytes = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if nbytes <= 0:
        raise UsageError(
            f"{size!r} is not a size", hint="a number and K, M, G or T, such as 2G or 500M"
        )
    return nbytes
