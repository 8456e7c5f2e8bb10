"""The picture is well-formed SVG whose points stand where the numbers are."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from quantcli.report.plot import HEIGHT, WIDTH, Point, draw_plot

SVG = "{http://www.w3.org/2000/svg}"


def _circles(points: list[Point]) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(draw_plot(points))
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{SVG}circle")]


def test_fewer_bits_stand_left_and_more_divergence_higher() -> None:
    points = [Point("t", "q8", 8.5, 3e-4), Point("t", "q4", 4.5, 1e-2), Point("t", "q2", 2.6, 0.2)]
    places = _circles(points)
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    # Drawn from the fewest bits on, and SVG counts downwards.
    assert [y for _, y in places] == sorted(y for _, y in places)


def test_decades_are_equally_far_apart() -> None:
    places = _circles([Point("t", str(i), 2 + i, 10.0 ** -(i + 1)) for i in range(3)])
    assert places[1][1] - places[0][1] == pytest.approx(places[2][1] - places[1][1], abs=0.2)


@pytest.mark.parametrize("divergence", [0.0, -1e-7, 1e-12, 0.5, 40.0])
def test_a_single_point_lies_within_the_picture(divergence: float) -> None:
    ((x, y),) = _circles([Point("t", "m", 4.0, divergence)])
    assert 0 <= x <= WIDTH
    assert 0 <= y <= HEIGHT


def test_names_from_a_file_system_are_escaped() -> None:
    root = ElementTree.fromstring(draw_plot([Point("a<b", 'm&"\x1b[2J.gguf', 4.0, 0.1)]))
    texts = ["".join(e.itertext()) for e in root.iter(f"{SVG}text")]
    assert 'm&"?[2J.gguf' in texts
    assert "a<b" in texts


def test_the_area_of_a_circle_is_the_speed() -> None:
    points = [Point("t", "slow", 8.5, 1e-3, 10.0), Point("t", "fast", 4.5, 1e-2, 40.0)]
    root = ElementTree.fromstring(draw_plot(points))
    fast, slow = (float(c.attrib["r"]) for c in root.iter(f"{SVG}circle"))
    assert (fast / slow) ** 2 == pytest.approx(4.0, rel=1e-3)
    titles = ["".join(title.itertext()) for title in root.iter(f"{SVG}title")]
    assert titles[0].endswith("40 tokens per second")
    assert "larger circles write faster" in draw_plot(points)
    assert "larger circles" not in draw_plot([Point("t", "m", 4.0, 0.1)])
