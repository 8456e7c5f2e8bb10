"""A checkpoint's own regular expressions are run in bounded time, and mean what they mean."""

import re
import time

import pytest

from quantcli.errors import SourceError
from quantcli.layouts import patterns
from quantcli.layouts.patterns import fit_patterns

NAMES = [f"model.layers.{i}.{part}" for i in range(12) for part in ("mlp.up", "attn.q")] + [
    "lm_head"
]


@pytest.mark.parametrize(
    "pattern",
    [
        r".*lm_head",
        r"(.*\.)?lm_head",
        r".*layers\.(0|1|11)\..*",
        r"model\.layers\.\d+\.mlp.*",
        r"^(?!.*(lm_head|attn)).*$",
        r"(model|encoder)\.(layers|blocks)\.[0-9]+\.(mlp|attn)\.(up|q)",
        r".*model.*layers.*1.*mlp.*up",
    ],
)
def test_an_expression_means_what_it_means_to_python(pattern: str) -> None:
    found = fit_patterns([pattern], NAMES, "config.json")[pattern]
    assert found == {name for name in NAMES if re.match(pattern, name)}
    assert 0 < len(found) < len(NAMES)


@pytest.mark.parametrize(
    "pattern",
    [
        "(([a-z_.0-9]+)+)+!",
        "([a-z]{1,2}|.)*!",
        "([a-z]{1,2}|.)" * 40 + "!",
        ".?" * 60 + "." * 60 + "!",
        ".*" * 40 + "!",
        "(?=(([a-z_.0-9]+)+)+!)",
    ],
)
def test_an_expression_that_never_ends_is_refused(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    begun = time.monotonic()
    with pytest.raises(SourceError, match=r"config\.json: the regular expressions take more than"):
        fit_patterns(
            [".*", pattern], ["model.layers.0.self_attn.q_projections.weights" * 3], "config.json"
        )
    assert time.monotonic() - begun < 5


def test_many_expressions_of_the_quick_kind_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    begun = time.monotonic()
    with pytest.raises(SourceError, match="take more than"):
        fit_patterns([".*.*.*!"], ["a" * 250] * 1000, "config.json")
    assert time.monotonic() - begun < 5
    with pytest.raises(SourceError, match="take more than"):
        fit_patterns((f".*.*.*{i}!" for i in range(10**6)), ["a" * 250] * 4, "config.json")
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("pattern", ["(", "((", "(" * 5000, "a{99999999999}", "(a)(b)\\3"])
def test_what_is_no_expression_is_said(pattern: str) -> None:
    with pytest.raises(SourceError, match="is no regular expression"):
        fit_patterns([pattern], NAMES, "config.json")
