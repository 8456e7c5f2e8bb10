"""Windows that a model writes: drawn from its own predictions, alike on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from support.frozen_inputs import write_input

import quantcli
from quantcli.errors import ArchitectureError, PlanError, UsageError
from quantcli.layerwise import own_samples
from quantcli.layerwise.layerwise_model import LayerwiseModel
from quantcli.layerwise.own_samples import _SEED, write_samples
from quantcli.layerwise.steady import use_threads
from quantcli.layerwise.texts import Text
from quantcli.layerwise.windows import Ids
from quantcli.model import Model, open_model
from quantcli.run import forecast
from quantcli.run.calibrated_run import plan_passes, prepare_run
from quantcli.types import Event, Note, Progress

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"
TEXT = Path(__file__).parents[1] / "golden" / "calibration.txt"
COUNT, LENGTH = 5, 24


@pytest.fixture(scope="module")
def mini() -> Iterator[Model]:
    with open_model(MINI) as model:
        yield model


def write(model: Model, threads: int = 1, **part: int) -> Ids:
    use_threads(threads)
    events = write_samples(model, LayerwiseModel(model, model.config), COUNT, LENGTH, **part)
    while True:
        try:
            event = next(events)
        except StopIteration as done:
            assert isinstance(event, Progress)
            assert part or event.done == event.total
            return np.asarray(done.value)


def test_samples_are_draws_from_the_model_s_predictions(mini: Model) -> None:
    ids = torch.from_numpy(write(mini).astype(np.int64))
    module = _module()
    with torch.no_grad():
        logits = module(ids).logits.double()
    draw = torch.Generator().manual_seed(_SEED)
    special = np.array(mini.metadata["tokenizer.ggml.token_type"].value) != 1
    usual = np.flatnonzero(~special)
    first = usual[torch.randint(len(usual), (COUNT, 1), generator=draw)[:, 0].numpy()]
    assert (ids[:, 0] == module.config.bos_token_id).all()
    assert (ids[:, 1].numpy() == first).all()
    for place in range(2, LENGTH):
        aims = torch.rand((COUNT, 1), generator=draw, dtype=torch.float64)[:, 0]
        chances = torch.softmax(logits[:, place - 1], dim=-1)
        for window, token in enumerate(ids[:, place].tolist()):
            below = float(chances[window, :token].sum())
            assert below - 1e-5 <= float(aims[window]) <= below + chances[window, token] + 1e-5


def test_the_number_of_threads_changes_nothing(mini: Model) -> None:
    alone = write(mini)
    assert len(np.unique(alone)) > COUNT * LENGTH // 3
    for threads in (2, 3):
        np.testing.assert_array_equal(write(mini, threads), alone)


def test_batches_can_be_written_by_several(mini: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_samples, "BATCH", 2)
    whole = write(mini)
    parts = [write(mini, first=first, every=2) for first in (0, 1)]
    assert not parts[0][2:4].any()
    assert not parts[1][[0, 1, 4]].any()
    np.testing.assert_array_equal(parts[0] + parts[1], whole)
    assert len(np.unique(whole[:, 1])) > 3


def test_a_model_that_keeps_nothing_of_earlier_tokens_is_refused(
    mini: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = LayerwiseModel(mini, mini.config)
    answer = layers.module.forward

    def forget(**given: object) -> object:
        result = answer(**given)
        result.past_key_values = None
        return result

    monkeypatch.setattr(layers.module, "forward", forget)
    with pytest.raises(ArchitectureError, match="cannot write a text") as refused:
        next(write_samples(mini, layers, 2, 8))
    assert "--sample-share 0" in str(refused.value.hint)


def test_shares_are_of_all_windows(mini: Model, tmp_path: Path) -> None:
    texts = [Text("a text", TEXT.read_text())]
    run = prepare_run(mini, texts, ctx=64, chunks=12, random_share=0.25, sample_share=0.5)
    assert (run.random_windows, run.samples, len(run.windows.ids)) == (12, 24, 48)
    with pytest.raises(ValueError, match="not written"):
        plan_passes(run, tmp_path, None, None, 0, 1)
    for shares in ((0.5, 0.5), (0.3, 0.8), (0.0, 1.0)):
        with pytest.raises(UsageError, match="leaves no text"):
            prepare_run(
                mini, texts, ctx=64, chunks=12, random_share=shares[0], sample_share=shares[1]
            )


def test_a_model_larger_than_the_memory_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {
        "type": "Q4_0", "method": "gptq", "calibrate": [str(TEXT)], "chunks": 2, "dry_run": True,
    }  # fmt: skip
    weights = 4 * sum(v.numel() for v in _module().parameters())
    monkeypatch.setattr(forecast, "machine_memory", lambda: weights)
    with pytest.raises(PlanError, match="all its weights in memory") as refused:
        quantcli.quantize(MINI, tmp_path / "a.gguf", sample_share=0.5, **options)
    assert "--sample-share 0" in str(refused.value.hint)
    quantcli.quantize(MINI, tmp_path / "a.gguf", **options)


def _module() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32)


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    write_input("small", tmp_path)
    options: Any = {
        "type": "Q4_0", "method": "gptq", "fisher_windows": 2, "calibrate": [str(TEXT)],
        "chunks": 2, "random_share": 0.25, "sample_share": 0.25, "threads": 1,
    }  # fmt: skip
    seen: list[Event] = []
    small, whole, path = (tmp_path / name for name in ("small", "a.gguf", "b.gguf"))
    quantcli.quantize(small, whole, on_event=seen.append, **options)
    notes = [event.message for event in seen if isinstance(event, Note)]
    assert any("and 1 of random tokens and 1 that the model wrote" in note for note in notes)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.what == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantcli.quantize(small, path, on_event=stop, **options)
    seen.clear()
    quantcli.quantize(small, path, on_event=seen.append, resume=True, **options)
    assert any(isinstance(e, Note) and "continuing after layer" in e.message for e in seen)
    assert path.read_bytes() == whole.read_bytes()
