"""A whole calibrated quantization: better than importance weights, repeatable, resumable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
from support import tiny_models

pytest.importorskip("torch")
pytest.importorskip("transformers")

from quantcli.artifacts.gguf_file import prepare_gguf, take_encoded
from quantcli.artifacts.write import write_artifact
from quantcli.errors import OutputError, PlanError, SourceError, UsageError
from quantcli.layerwise.texts import Text
from quantcli.model import Model, open_model
from quantcli.plan.recipe import Recipe
from quantcli.rounding.options import Options, Outcome
from quantcli.run.calibrated_run import begin_rounding, prepare_run, round_tensors
from quantcli.types import Event, Note

pytestmark = pytest.mark.slow

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"
TEXT = (Path(__file__).parents[1] / "golden" / "calibration.txt").read_text()


@dataclass
class Run:
    """One run's output, its events, and where its folder is."""

    path: Path
    events: list[Event]

    @property
    def outcomes(self) -> dict[str, Outcome]:
        return {event.tensor: event for event in self.events if isinstance(event, Outcome)}

    @property
    def notes(self) -> str:
        return "\n".join(event.message for event in self.events if isinstance(event, Note))


def _run(
    model: Model, path: Path, *, file_type: str = "Q4_K_S", chunks: int = 12, ctx: int = 64,
    options: Options | None = None, threads: int = 1, resume: bool = False, stop: int | None = None,
    random_share: float = 0.0,
) -> Run:  # fmt: skip
    """Quantize; ``stop`` ends the run after so many outcomes, as an interrupt does."""
    planned = prepare_run(
        model, [Text("a text", TEXT)], ctx=ctx, chunks=chunks, random_share=random_share
    )
    job = prepare_gguf(model, Recipe(type=file_type), path, importance=planned.importance)
    encoding = begin_rounding(
        planned, job.plan, path, options or Options(), dtype="float32", threads=threads,
        resume=resume,
    )  # fmt: skip
    events = round_tensors(encoding)
    seen = []
    for event in events:
        seen.append(event)
        if stop is not None and sum(isinstance(event, Outcome) for event in seen) == stop:
            break
    else:
        for _ in write_artifact(take_encoded(job, encoding.store), threads=threads):
            pass
        encoding.checkpoint.remove()
    if isinstance(events, Iterator) and hasattr(events, "close"):
        events.close()
    encoding.store.close()
    return Run(path, seen)


@pytest.fixture(scope="module")
def mini() -> Iterator[Model]:
    with open_model(MINI) as model:
        yield model


@pytest.fixture(scope="module")
def whole(mini: Model, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run(mini, tmp_path_factory.mktemp("whole") / "m.gguf")


def test_every_matrix_is_rounded_and_better_on_held_out_text(whole: Run) -> None:
    outcomes = whole.outcomes
    assert len(outcomes) == 4 * 7 + 1
    assert "token_embd.weight" in outcomes
    better = [o.after < 0.8 * o.before for o in outcomes.values()]
    assert sum(better) >= 25
    assert all(o.after <= o.before for o in outcomes.values())
    assert "29 matrices rounded" in whole.notes


def test_the_file_holds_what_was_rounded(whole: Run, mini: Model) -> None:
    """gguf's decoder finds the relative losses that the run reported."""
    reader = gguf.GGUFReader(whole.path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    info = next(t for t in mini.tensors if t.name == "blk.1.ffn_up.weight")
    weights = mini.read_rows(info, 0, info.rows).astype(np.float32)
    found = gguf.dequantize(stored[info.name].data, stored[info.name].tensor_type)
    share = float(((weights - found) ** 2).sum() / (weights**2).sum())
    # Feedback moves error into directions that the inputs do not have, so plain error grows.
    assert 0.002 < share < 0.02
    recipe = reader.fields["quantcli.recipe"].contents()
    assert 'type = "Q4_K_S"' in recipe
    assert reader.fields["quantize.imatrix.chunks_count"].contents() == 12


def test_the_same_run_gives_the_same_bytes(whole: Run, mini: Model, tmp_path: Path) -> None:
    again = _run(mini, tmp_path / "m.gguf")
    assert again.path.read_bytes() == whole.path.read_bytes()


def test_an_interrupted_run_goes_on(whole: Run, mini: Model, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    _run(mini, path, stop=16)
    assert not path.exists()
    with pytest.raises(OutputError, match="interrupted"):
        _run(mini, path)
    resumed = _run(mini, path, resume=True)
    assert "continuing after layer" in resumed.notes
    assert path.read_bytes() == whole.path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_with_other_options_is_not_continued(mini: Model, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    _run(mini, path, stop=16)
    with pytest.raises(SourceError, match="method options"):
        _run(mini, path, resume=True, options=Options(sweeps=3))
    with pytest.raises(SourceError, match="choice of types"):
        _run(mini, path, resume=True, file_type="Q3_K_S")


def test_propagation_fits_to_the_quantized_prefix(whole: Run, mini: Model, tmp_path: Path) -> None:
    run = _run(mini, tmp_path / "m.gguf", options=Options(propagate=True))
    assert run.path.read_bytes() != whole.path.read_bytes()
    first = "blk.0.attn_q.weight"
    # The first layer's inputs differ by the embedding's error alone.
    assert run.outcomes[first].after == pytest.approx(whole.outcomes[first].after, rel=0.2)
    stopped = tmp_path / "resumed.gguf"
    _run(mini, stopped, options=Options(propagate=True), stop=16)
    _run(mini, stopped, options=Options(propagate=True), resume=True)
    assert stopped.read_bytes() == run.path.read_bytes()


@pytest.mark.parametrize("name", ["mixtral", "gemma2", "qwen3", "phi3", "gpt2"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    folder = tiny_models.build(name, tmp_path / "model")
    with open_model(folder) as model:
        run = _run(model, tmp_path / "m.gguf", file_type="Q4_0", chunks=24)
    assert all(o.after <= o.before for o in run.outcomes.values())
    ratios = [o.after / o.before for o in run.outcomes.values() if o.kept < o.matrices]
    assert np.mean(ratios) < 0.95
    assert gguf.GGUFReader(run.path).tensors


def test_few_tokens_are_said_and_count_for_less(mini: Model, tmp_path: Path) -> None:
    run = _run(mini, tmp_path / "m.gguf", chunks=4)
    assert "are few for 768 columns" in run.notes
    assert all(o.after <= o.before for o in run.outcomes.values())


def test_refusals(mini: Model, tmp_path: Path, whole: Run) -> None:
    with open_model(whole.path) as model, pytest.raises(SourceError, match="is a GGUF"):
        prepare_run(model, [Text("a text", TEXT)])
    with pytest.raises(PlanError, match="quantizes nothing"):
        _run(mini, tmp_path / "m.gguf", file_type="F16")
    for options, message in (
        (Options(damping=0), "--damping 0 is out of range"),
        (Options(column_order="random"), "--column-order random is not one of"),
        (Options(sweeps=-1), "--sweeps -1 is out of range"),
    ):
        with pytest.raises(UsageError, match=message):
            _run(mini, tmp_path / "m.gguf", options=options)
    assert not list(tmp_path.iterdir())


def test_random_tokens_join_the_text(mini: Model, tmp_path: Path, whole: Run) -> None:
    run = _run(mini, tmp_path / "m.gguf", random_share=0.25)
    assert "12 windows of 64 tokens from a text" in run.notes
    assert "and 4 of random tokens" in run.notes
    assert run.path.read_bytes() != whole.path.read_bytes()
    planned = prepare_run(mini, [Text("a text", TEXT)], ctx=64, chunks=12, random_share=0.25)
    drawn = planned.windows.ids[12:]
    special = [i for i, kind in enumerate(mini.metadata["tokenizer.ggml.token_type"].value)
               if kind != 1]  # fmt: skip
    assert not np.isin(drawn[:, 1:], special).any()
    assert len(np.unique(drawn)) > 200
    with pytest.raises(UsageError, match="random windows"):
        prepare_run(mini, [Text("a text", TEXT)], ctx=64, chunks=12, random_share=1.0)
