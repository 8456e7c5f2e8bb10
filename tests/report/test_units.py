from __future__ import annotations

import pytest

from quantcli.report import units

CASES = [
    (units.size_text, 0, "0 B"),
    (units.size_text, 999, "999 B"),
    (units.size_text, 1000, "1.00 kB"),
    (units.size_text, 8_393_216, "8.39 MB"),
    (units.size_text, 16_786_432, "16.8 MB"),
    (units.size_text, 999_499, "999 kB"),
    (units.size_text, 999_500, "1.00 MB"),
    (units.size_text, 9_994_999, "9.99 MB"),
    (units.size_text, 9_995_000, "10.0 MB"),
    (units.size_text, 99_950_000, "100 MB"),
    (units.size_text, 70 * 10**9 * 4, "280 GB"),
    (units.size_text, 35 * 10**9, "35.0 GB"),
    (units.size_text, 2 * 10**18, "2000 PB"),
    (units.count_text, 0, "0"),
    (units.count_text, 960, "960"),
    (units.count_text, 4_196_608, "4.20M"),
    (units.count_text, 70_553_706_496, "70.6B"),
    (units.percent_text, 0, "0 %"),
    (units.percent_text, 1, "100 %"),
    (units.percent_text, 0.284, "28.4 %"),
    (units.percent_text, 0.0031, "0.31 %"),
    (units.percent_text, 0.00001, "< 0.01 %"),
    (units.percent_text, 1.5, "150 %"),
    (units.rate_text, 0, "0 %"),
    (units.rate_text, 0.0031, "0.31 %"),
    (units.rate_text, 5.1e-6, "5.1 ppm"),
    (units.duration_text, 0.44, "0.4 s"),
    (units.duration_text, 9.96, "10 s"),
    (units.duration_text, 59.6, "1 min 00 s"),
    (units.duration_text, 185, "3 min 05 s"),
    (units.duration_text, 7620, "2 h 07 min"),
    (units.number_text, -0.012345, "-0.0123"),
    (units.number_text, 1.5e-7, "1.5e-07"),
    (units.shape_text, (4096, 11008), "4096 x 11008"),
    (units.shape_text, (), "scalar"),
]


@pytest.mark.parametrize(
    ("function", "value", "text"), CASES, ids=[f"{f.__name__}-{v}" for f, v, _ in CASES]
)
def test_numbers_as_people_read_them(function, value, text):
    assert function(value) == text


def test_a_size_grows_with_its_bytes_and_never_shows_four_digits():
    texts = [units.size_text(round(10 ** (step / 20))) for step in range(340)]
    assert all(len(text.split()[0].replace(".", "")) <= 3 for text in texts)
