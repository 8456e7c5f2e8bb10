"""KL divergence against bits per weight, as a small SVG: which file is worth its size.

Where speeds were measured, a circle's area is the tokens that a model writes per second.

Written by hand, since one picture is no reason for a plotting library. The divergence is drawn on
a logarithmic axis, because each bit less multiplies it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 20, 40, 60
_COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7d4e9f", "#8a6d1d")
_RADIUS, _FASTEST = 4, 12
"""Of circles without a speed, and of the fastest model's."""
_SMALLEST = 1e-9
"""A divergence of zero has no place on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class Point:
    """One model on one text."""

    series: str
    label: str
    bits: float
    divergence: float
    speed: float | None = None
    """Tokens written per second."""


def draw_plot(points: Sequence[Point]) -> str:
    """The SVG of at least one point."""
    return "\n".join(_lines(points)) + "\n"


def _lines(points: Sequence[Point]) -> Iterator[str]:
    bits = [point.bits for point in points]
    klds = [max(point.divergence, _SMALLEST) for point in points]
    first, last = math.floor(min(bits)), max(math.ceil(max(bits)), math.floor(min(bits)) + 1)
    low = math.floor(math.log10(min(klds)))
    high = max(math.ceil(math.log10(max(klds))), low + 1)

    def x(value: float) -> float:
        return _LEFT + (value - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)

    def y(power: float) -> float:
        return HEIGHT - _BOTTOM - (power - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">'
    )
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    step = max(1, (last - first) // 12)
    for value in range(first, last + 1, step):
        yield _line(x(value), _TOP, x(value), HEIGHT - _BOTTOM)
        yield _text(x(value), HEIGHT - _BOTTOM + 18, str(value), "middle")
    for power in range(low, high + 1):
        yield _line(_LEFT, y(power), WIDTH - _RIGHT, y(power))
        yield _text(_LEFT - 8, y(power) + 4, f"{10.0**power:g}", "end")
    yield _text(WIDTH / 2, HEIGHT - 16, "bits per weight", "middle")
    fastest = max((point.speed or 0.0 for point in points), default=0.0)
    said = "; larger circles write faster" if fastest else ""
    yield _text(_LEFT, 22, f"mean KL divergence from the base, in nats{said}", "start")
    for number, series in enumerate(dict.fromkeys(point.series for point in points)):
        colour = _COLOURS[number % len(_COLOURS)]
        members = sorted((p for p in points if p.series == series), key=lambda p: p.bits)
        places = [(x(p.bits), y(math.log10(max(p.divergence, _SMALLEST)))) for p in members]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        for point, (a, b) in zip(members, places, strict=True):
            told = f"{point.label}: {point.bits:.2f} bits, {point.divergence:.6g} nats"
            radius, faint = float(_RADIUS), ""
            if point.speed and fastest:
                told += f", {point.speed:,.4g} tokens per second"
                radius = _FASTEST * math.sqrt(point.speed / fastest)
                faint = ' fill-opacity="0.6"'
            title = _shown(told)
            yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{radius:.4g}" fill="{colour}"{faint}>'
            yield f"<title>{title}</title></circle>"
            side = "end" if a > WIDTH - 160 else "start"
            aside = radius + 4
            yield _text(a + (-aside if side == "end" else aside), b - 6, point.label, side)
        yield _text(WIDTH - _RIGHT, 22 + 16 * number, series, "end", colour)
    yield "</svg>"


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
        f"{_shown(text)}</text>"
    )


def _shown(text: str) -> str:
    """XML has no place for control characters."""
    return escape("".join(c if c.isprintable() else "?" for c in text))
