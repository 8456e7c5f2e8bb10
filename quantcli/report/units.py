"""Numbers as people read them.

Sizes are decimal (1 GB = 10^9 bytes), as on disk labels, on the Hugging Face Hub and in
llama.cpp's ``--split-max-size``; three significant digits, so that columns compare at a glance.
Exact integers belong to ``--json``.
"""

from __future__ import annotations

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_COUNT_UNITS = ("", "k", "M", "B", "T")


def _scaled(value: float, steps: int) -> tuple[str, int]:
    """``value`` with three significant digits, and how many times it was divided by 1000."""
    step = 0
    # 999.5 would be printed as 1000, so it already belongs to the next unit.
    while abs(value) >= 999.5 and step < steps:
        value /= 1000
        step += 1
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}", step


def size_text(nbytes: float) -> str:
    """A number of bytes: "999 B", "8.39 MB", "280 GB"."""
    if abs(nbytes) < 1000:
        return f"{nbytes:.0f} B"
    number, step = _scaled(nbytes, len(_BYTE_UNITS) - 1)
    return f"{number} {_BYTE_UNITS[step]}"


def count_text(count: int) -> str:
    """A number of weights in the field's shorthand: "960", "4.19M", "70.6B"."""
    if abs(count) < 1000:
        return str(count)
    number, step = _scaled(count, len(_COUNT_UNITS) - 1)
    return f"{number}{_COUNT_UNITS[step]}"


def percent_text(share: float) -> str:
    """A share of one: "100 %", "28.4 %", "0.31 %", "< 0.01 %"."""
    percent = 100 * share
    if 0 < percent < 0.01:
        return "< 0.01 %"
    digits = 0 if percent == 0 or percent >= 99.95 else 1 if percent >= 9.995 else 2
    return f"{percent:.{digits}f} %"


def rate_text(share: float) -> str:
    """A share that may be tiny: as a percentage, or in parts per million below 0.01 %."""
    return f"{1e6 * share:.2g} ppm" if 0 < share < 1e-4 else percent_text(share)


def duration_text(seconds: float) -> str:
    """A time span: "0.4 s", "25 s", "3 min 05 s", "2 h 07 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number_text(value: float) -> str:
    """A measured number in three significant digits: "0.0123", "-3.2", "1.5e-07"."""
    return f"{value:.3g}"


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape, rows first: "4096 x 11008"; "scalar" when there are no axes."""
    return " x ".join(map(str, shape)) if shape else "scalar"
