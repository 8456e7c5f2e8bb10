"""Weights that are read while something else works: once each, and errors where they are taken."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch

from quantcli.errors import WeightError
from quantcli.layerwise.hidden_states import HiddenStateCache
from quantcli.layerwise.layerwise_model import LayerwiseModel
from quantcli.layerwise.read_ahead import ReadAhead
from quantcli.layerwise.walk import LayerWalk, run_silently
from quantcli.layerwise.windows import Tokenizer
from quantcli.model import open_model

CPU = torch.device("cpu")


def test_what_was_begun_is_read_once_and_elsewhere() -> None:
    threads: dict[str, list[str]] = {}

    def read(name: str) -> torch.Tensor:
        threads.setdefault(name, []).append(threading.current_thread().name)
        return torch.full((2,), float(len(name)))

    ahead = ReadAhead(read, CPU)
    ahead.begin(["a", "bb"])
    assert ahead.take("bb").tolist() == [2, 2]
    assert ahead.take("ccc").tolist() == [3, 3]
    ahead.begin(["dddd"])
    assert ahead.take("a").tolist() == [1, 1]
    assert ahead.take("dddd").tolist() == [4, 4]
    assert [name.partition("_")[0] for name in threads["bb"]] == ["weights"]
    assert threads["ccc"] == ["MainThread"]
    assert threads["a"][-1] == "MainThread"
    assert len(threads["dddd"]) == 1


def test_an_error_comes_when_the_weight_is_taken() -> None:
    def read(name: str) -> torch.Tensor:
        raise WeightError(f"{name} is damaged")

    ahead = ReadAhead(read, CPU)
    ahead.begin(["x"])
    with pytest.raises(WeightError, match="x is damaged"):
        ahead.take("x")


def _note(begun: list[list[str]], read: Callable[[list[str]], None], names: list[str]) -> None:
    begun.append(list(names))
    read(names)


def test_a_walk_that_reads_ahead_gives_the_same(
    mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[str]] = []
    with open_model(mini) as model:
        layers = LayerwiseModel(model, model.config)
        ids = Tokenizer(model).encode("a text of a few words")
        windows = np.array([ids[:4]] * 2, np.int32)
        found: list[torch.Tensor] = []
        for ahead in (False, True):
            states = HiddenStateCache((*windows.shape, layers.hidden_size), layers.dtype)
            walk = LayerWalk(layers, windows, states)
            walk._ahead = ahead
            monkeypatch.setattr(layers, "read_ahead", partial(_note, begun, layers.read_ahead))
            run_silently(walk.forward())
            found.append(states.get(1))
            monkeypatch.undo()
        assert len(begun) == len(layers.layers) - 1
        assert begun[0] == layers.layer_parameters(1)
        assert torch.equal(*found)
