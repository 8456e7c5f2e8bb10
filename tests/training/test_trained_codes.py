"""Codes trained end to end: each state is one of the grid, and predictions come closer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ggml, tiny_models

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from support.trained_runs import train

from quantcli.formats import get_format, native
from quantcli.formats.codebook_lattice import CODEBOOKS, SIGNS_SHIFT
from quantcli.formats.grids import load_grid
from quantcli.formats.lattice import LATTICES
from quantcli.model import Model, open_model
from quantcli.rounding.quantized_model import QuantizedModel
from quantcli.rounding.trained import TrainingGain
from quantcli.training import end_to_end
from quantcli.training.code_parameters import CodeParameters
from quantcli.training.projections import projection_of
from quantcli.types import Event, Progress

KINDS = sorted([*LATTICES, *CODEBOOKS])


class Store:
    """One tensor's packed rows, as a run's store has them."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed

    def shape(self, name: str) -> tuple[int, int]:
        rows, width = self.packed.shape
        return rows, width

    def read_stored(self, name: str, start: int, stop: int) -> Any:
        return self.packed[start:stop]


@pytest.fixture
def rows() -> Any:
    draws = np.random.default_rng(7)
    return (draws.standard_normal((6, 512)) * draws.uniform(0.01, 0.1, (6, 1))).astype(np.float32)


def _parameters(kind: str, rows: Any, folder: Path) -> tuple[CodeParameters, Any]:
    fmt = get_format(kind)
    folder.mkdir(exist_ok=True)
    weights = np.ones(rows.shape[1], np.float32) if fmt.needs_importance else None
    packed = native.encode(fmt, rows, weights)
    store: Any = Store(packed)
    codes = CodeParameters(store, {"a": kind}, lambda _, start, stop: rows[start:stop], folder)
    return codes, packed


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_before_a_step(kind: str, rows: Any, tmp_path: Path) -> None:
    codes, packed = _parameters(kind, rows, tmp_path)
    assert np.array_equal(codes.read_packed("a", 0, len(rows)), packed)
    for _ in range(4):
        codes.forget()
        codes.descend(0.01)
    decoded = ggml.dequantize(get_format(kind).type_id, codes.read_packed("a", 0, len(rows)))
    assert np.array_equal(decoded, ggml.dequantize(get_format(kind).type_id, packed))
    codes.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_follow_a_gradient_on_the_grid(kind: str, rows: Any, tmp_path: Path) -> None:
    """Towards another state of the grid, which is met, and scales keep their bytes."""
    draws = np.random.default_rng(3)
    other, _ = _parameters(kind, rows, tmp_path / "other")
    for _ in range(4):
        other.forget()
        other.add_rows("a", 0, draws.standard_normal(rows.shape).astype(np.float32))
        other.descend(0.4)
    number = get_format(kind).type_id
    aim = ggml.dequantize(number, other.read_packed("a", 0, len(rows)))
    other.close()
    codes, packed = _parameters(kind, rows, tmp_path)
    before = float(np.square(ggml.dequantize(number, packed) - aim).sum())
    for _ in range(100):
        found = ggml.dequantize(number, codes.read_packed("a", 0, len(rows)))
        codes.forget()
        codes.add_rows("a", 0, found[:3] - aim[:3])
        codes.add_rows("a", 3, found[3:] - aim[3:])
        codes.descend(0.04)
    after = codes.read_packed("a", 0, len(rows))
    found = ggml.dequantize(number, after)
    assert before > 0
    assert float(np.square(found - aim).sum()) < 0.3 * before
    fmt = get_format(kind)
    lattice = CODEBOOKS[kind] if kind in CODEBOOKS else LATTICES[kind]
    parts, old = (lattice.split(x.reshape(-1, fmt.nbytes)) for x in (after, packed))
    assert np.array_equal(parts.d, old.d)
    assert np.array_equal(parts.scales, old.scales)
    codes.keep()
    codes.descend(5.0)
    codes.restore()
    assert np.array_equal(codes.read_packed("a", 0, len(rows)), after)
    codes.close()


@pytest.mark.parametrize("kind", ["Q4_K", "IQ1_S", "IQ3_XXS"])
def test_codes_do_not_depend_on_threads(
    kind: str, rows: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    made = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        codes, _ = _parameters(kind, rows, tmp_path / str(threads))
        draws = np.random.default_rng(1)
        for _ in range(12):
            codes.forget()
            codes.add_rows("a", 0, draws.standard_normal(rows.shape).astype(np.float32))
            codes.descend(0.1)
        made.append(codes.read_packed("a", 0, len(rows)).copy())
        codes.close()
    assert np.array_equal(*made)


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_is_the_nearest_point(kind: str) -> None:
    """By trying each point with each sign; with an even number of them, one that is no worse."""
    draws = np.random.default_rng(11)
    projection = projection_of(kind)
    low, high = projection.bounds
    if kind not in CODEBOOKS:
        latents = torch.from_numpy(draws.uniform(low, high, (500, 1)).astype(np.float32))
        levels = np.unique(LATTICES[kind].levels)
        found = projection.points(projection.project(latents))
        nearest = levels[np.abs(latents.numpy() - levels).argmin(axis=1)]
        assert np.array_equal(found[:, 0].numpy(), nearest)
        return
    lattice = CODEBOOKS[kind]
    latents = torch.from_numpy(draws.uniform(low, high, (64, lattice.group)).astype(np.float32))
    codes = projection.project(latents)
    found = projection.points(codes).numpy()
    distance = np.square(found - latents.numpy()).sum(axis=1)
    if kind.startswith("IQ1"):
        grid = load_grid(kind).points
        up, down = (
            np.square(latents.numpy()[:, None] - (grid + shift)).sum(axis=2).min(axis=1)
            for shift in (0.125, -0.125)
        )
        if kind == "IQ1_S":  # four points share a shift
            distance, up, down = (each.reshape(-1, 4).sum(axis=1) for each in (distance, up, down))
        assert np.allclose(distance, np.minimum(up, down), rtol=1e-4)
        return
    shape = np.abs(latents.numpy())[:, None] - lattice.points
    least = np.square(shape).sum(axis=2).min(axis=1)
    if not lattice.even_signs:
        assert np.allclose(distance, least, rtol=1e-5)
        return
    minus = codes.numpy() >> SIGNS_SHIFT
    eights = minus if lattice.group == 8 else minus[0::2] | minus[1::2] << 4
    assert all(int(each).bit_count() % 2 == 0 for each in eights)
    # Turning one sign costs at most what the least weight of its point does.
    turned = 4 * (np.abs(latents.numpy()) * np.abs(found)).max()
    assert (distance <= least + turned).all()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with open_model(tiny_models.build("llama", tmp_path_factory.mktemp("small"))) as model:
        yield model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "Q2_K", "IQ2_S", "NVFP4"])
def test_codes_bring_the_divergence_further_down(kind: str, small: Model, tmp_path: Path) -> None:
    """Than factors and norms alone, on windows that training did not see."""
    both = [
        train(
            small, tmp_path / f"{codes}.gguf", file_type=kind, e2e_steps=60, e2e_codes=codes
        )
        for codes in (False, True)
    ]  # fmt: skip
    scales, codes = (run.gain for run in both)
    assert scales is not None
    assert codes is not None
    assert codes.before == scales.before
    assert codes.after < 0.995 * scales.after
    assert both[0].path.stat().st_size == both[1].path.stat().st_size
    for name, tensor in both[1].tensors.items():
        assert tensor.tensor_type == both[0].tensors[name].tensor_type


@pytest.mark.slow
def test_codes_of_an_interrupted_run_end_in_the_same_bytes(small: Model, tmp_path: Path) -> None:
    whole = train(small, tmp_path / "whole.gguf", file_type="Q4_K_S")
    path = tmp_path / "m.gguf"
    train(small, path, file_type="Q4_K_S", stop=4)
    train(small, path, file_type="Q4_K_S", resume=True)
    assert path.read_bytes() == whole.path.read_bytes()
    assert sorted(tmp_path.iterdir()) == [path, whole.path]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tied", "mixtral-stacked", "gpt2"])
def test_gradients_by_weights_are_those_of_the_divergence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Central differences of the decoded weights along their gradient."""
    shares = []
    moved: dict[str, Any] = {}
    read = QuantizedModel.read_rows

    def shifted(self: Any, tensor: Any, start: int, stop: int) -> Any:
        found = read(self, tensor, start, stop)
        return found + moved[tensor.name][start:stop] if tensor.name in moved else found

    def check(self: Any, steps: int) -> Iterator[Event]:
        parameters, backprop, numbers = self._moved, self._backprop, self._shares.fitted[:2]
        parameters.forget()
        backprop.learn(numbers)
        gradients = {
            name: each.planes[3].copy() for name, each in parameters._codes._tensors.items()
        }
        assert all(gradient.any() for gradient in gradients.values())
        judged, expected = [], 0.0
        for sign in (1, -1):
            expected = 0.0
            for tensor, gradient in gradients.items():
                way = 2e-4 * np.sign(gradient)
                expected += float((gradient * way).sum())
                moved[tensor] = sign * way
            judged.append(backprop.judge(numbers))
        moved.clear()
        shares.append((judged[0] - judged[1]) / (2 * expected))
        yield Progress(0, 1, "")
        end_to_end.save_trained(self._run.folder, None, TrainingGain(steps, 1.0, 1.0))

    monkeypatch.setattr(QuantizedModel, "read_rows", shifted)
    monkeypatch.setattr(end_to_end._ModelTraining, "run", check)
    with open_model(tiny_models.build(name, tmp_path / "model")) as model:
        train(model, tmp_path / "m.gguf", file_type="Q4_0")
    assert shares[0] == pytest.approx(1, abs=0.1)
