"""A statistics file with odd metadata or tensors is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.broken import entry, safetensors

from quantcli.errors import SourceError
from quantcli.statistics.statistics_file import STATISTICS_FORMAT, StatisticsFile

SOUND = {"a.counts": entry([1], 0, 8, "I64")}


@pytest.mark.parametrize("shares", [None, "", "no JSON", "[1]", '{"a": 1}', "[" * 100_000])
def test_odd_shares(shares: str | None, tmp_path: Path) -> None:
    facts = {"format": STATISTICS_FORMAT} | ({} if shares is None else {"hessian_of": shares})
    path = safetensors(tmp_path / "s.safetensors", {"__metadata__": facts, **SOUND}, b"\0" * 8)
    with pytest.raises(SourceError, match=r"s\.safetensors: its metadata has no names by name"):
        StatisticsFile(path)


@pytest.mark.parametrize(
    "tensor", [entry([8], 0, 8, "U8"), entry([], 0, 8, "I64"), entry([0, 2], 0, 0)]
)
def test_odd_tensors(tensor: dict[str, Any], tmp_path: Path) -> None:
    facts = {"format": STATISTICS_FORMAT, "hessian_of": json.dumps({})}
    data = b"\0" * tensor["data_offsets"][1]
    path = safetensors(tmp_path / "s.safetensors", {"__metadata__": facts, "a": tensor}, data)
    with pytest.raises(SourceError, match=r"s\.safetensors: a has dtype .*no statistics have"):
        StatisticsFile(path)


def test_a_sound_one(tmp_path: Path) -> None:
    facts = {"format": STATISTICS_FORMAT, "hessian_of": json.dumps({"a": "b"})}
    path = safetensors(
        tmp_path / "s.safetensors", {"__metadata__": facts, **SOUND}, b"\1" + b"\0" * 7
    )
    with StatisticsFile(path) as file:
        assert (file.shares, file.count("a")) == ({"a": "b"}, 1)
