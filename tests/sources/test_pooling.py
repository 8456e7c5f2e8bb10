"""Pooling from sentence-transformers' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantcli.errors import SourceError
from quantcli.sources.pooling import pooling_metadata
from quantcli.types import boolean, u32


def write(folder: Path, pooling: dict[str, Any], *more: str) -> Path:
    kinds = ["Transformer", "Pooling", *more]
    stages = [
        {"path": "" if i == 0 else f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(stages))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, 1),
        ({"pooling_mode_cls_token": True}, 2),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, 3),
        ({"pooling_mode": "mean"}, 1),
        ({"pooling_mode": "lasttoken"}, 3),
    ],
)
def test_llama_cpps_own_poolings(settings: dict[str, Any], number: int, tmp_path: Path) -> None:
    notes: list[str] = []
    found = pooling_metadata(write(tmp_path, settings, "Normalize"), "qwen3", {}, notes.append)
    assert found == {"qwen3.pooling_type": u32(number)}
    assert notes == []


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"pooling_mode_max_tokens": True}, "max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "and"),
        ({}, "None"),
    ],
)
def test_other_poolings_are_said(settings: dict[str, Any], word: str, tmp_path: Path) -> None:
    notes: list[str] = []
    assert pooling_metadata(write(tmp_path, settings), "qwen3", {}, notes.append) == {}
    assert word in notes[0]


def test_a_dense_stage_is_said(tmp_path: Path) -> None:
    notes: list[str] = []
    folder = write(tmp_path, {"pooling_mode_mean_tokens": True}, "Dense")
    assert pooling_metadata(folder, "bert", {}, notes.append) == {"bert.pooling_type": u32(1)}
    assert "the stage Dense" in notes[0]


def test_no_stages_no_key(tmp_path: Path) -> None:
    assert pooling_metadata(tmp_path, "llama", {}, print) == {}


@pytest.mark.parametrize("content", ["{}", "[1]", "["])
def test_broken_lists_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(SourceError, match=r"modules\.json"):
        pooling_metadata(tmp_path, "llama", {}, print)


def test_a_stage_outside_the_folder_is_refused(tmp_path: Path) -> None:
    stage = {"path": "../elsewhere", "type": "sentence_transformers.models.Pooling"}
    (tmp_path / "modules.json").write_text(json.dumps([stage]))
    with pytest.raises(SourceError, match="leaves the folder"):
        pooling_metadata(tmp_path, "llama", {}, print)


def test_an_encoder_that_does_not_say_how_is_remarked(tmp_path: Path) -> None:
    notes: list[str] = []
    keys = {"bert.attention.causal": boolean(False)}
    assert pooling_metadata(tmp_path, "bert", keys, notes.append) == {}
    assert "--override-kv bert.pooling_type=int:1 takes their mean" in notes[0]
    scored = {**keys, "bert.pooling_type": u32(4)}
    assert pooling_metadata(tmp_path, "bert", scored, notes.append) == {}
    assert len(notes) == 1
