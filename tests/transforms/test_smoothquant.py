"""On a model with outlier channels SmoothQuant takes away nine tenths of W8A8's divergence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.measured import calibrated

from quantcli.errors import UsageError
from quantcli.model import Model, open_model
from quantcli.transforms.base import TransformFound, TransformOptions
from quantcli.transforms.channel_scales import model_groups, scale_group
from quantcli.transforms.smoothquant import SMOOTHQUANT, token_step
from quantcli.transforms.spec import TransformSpec, merge_scales
from quantcli.transforms.transformed_model import TransformedModel, apply_transform

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"
OUTLIERS = 4
FACTOR = 100.0


def int8_rows(
    rows: NDArray[np.float32], importance: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Rows on a symmetric 8-bit grid of their own, the weights of W8A8."""
    scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-30) / np.float32(127)
    return np.asarray(np.rint(rows / scale) * scale, np.float32)


def with_outliers(model: Model) -> TransformedModel:
    """The same function, with a few channels behind every norm a hundred times as large."""
    draws = np.random.default_rng(0)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    parts = []
    for group in model_groups(model):
        if group.kind == "norm" and "blk" in group.name:
            scales = np.ones((1, group.channels))
            scales[0, draws.choice(group.channels, OUTLIERS, replace=False)] = 1 / FACTOR
            parts.append(scale_group(group, scales, tensors))
    return apply_transform(model, TransformSpec("outliers", merge_scales(parts)))


def linear_layers(model: Model) -> dict[str, Any]:
    return {t.name: int8_rows for t in model.tensors if t.name.startswith("blk") and t.rows > 1}


@contextmanager
def running(model: Model) -> Iterator[Any]:
    """transformers' module with all its weights."""
    from quantcli.layerwise.layerwise_model import LayerwiseModel

    layers = LayerwiseModel(model, model.config)
    inside = (layers.layer_parameters(i) for i in range(len(layers.layers)))
    names = [*layers.outside_layers(), *(n for layer in inside for n in layer)]
    with layers.filled(list(dict.fromkeys([*names, layers.embedding_name, layers.head_name]))):
        yield layers


def predictions(model: Model, windows: Sequence[Sequence[int]], *, eight_bits: bool) -> Any:
    """Log-probabilities; with ``eight_bits`` the layers' products are W8A8's."""
    with running(model) as layers, torch.inference_mode():
        undo = []
        for module in layers.layers.modules():
            if eight_bits and isinstance(module, torch.nn.Linear):
                weight = module.weight
                step = weight.abs().amax(1, keepdim=True) / 127
                module.weight = torch.nn.Parameter(
                    (weight / step).round() * step, requires_grad=False
                )
                undo.append((module, weight))
                undo.append((module.register_forward_pre_hook(_round_tokens), None))
        logits = layers.module(input_ids=torch.tensor(windows)).logits.double()
        for item, weight in undo:
            if weight is None:
                item.remove()
            else:
                item.weight = weight
    return logits.log_softmax(-1)


def _round_tokens(module: Any, inputs: Any) -> Any:
    step = inputs[0].abs().amax(-1, keepdim=True).clamp(min=1e-20) / 127
    return ((inputs[0] / step).round() * step,)


def divergence(base: Any, other: Any) -> float:
    return float((base.exp() * (base - other)).sum(-1).mean())


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    """Text that calibration does not see."""
    from tokenizers import Tokenizer

    text = (Path(__file__).parents[1] / "data" / "pride-and-prejudice.txt").read_text()
    ids = Tokenizer.from_file(str(MINI / "tokenizer.json")).encode(text[:20000]).ids
    return [ids[start : start + 128] for start in range(0, 8 * 128, 128)]


def smooth(model: Model, measured: Any, **options: Any) -> TransformFound:
    *_, found = SMOOTHQUANT.find(model, linear_layers(model), measured, TransformOptions(**options))
    assert isinstance(found, TransformFound)
    return found


@pytest.mark.parametrize("alpha", [None, 0.5, 0.8])
def test_outliers_move_into_the_weights(
    alpha: float | None, windows: list[list[int]], tmp_path: Path
) -> None:
    with open_model(MINI) as model:
        changed = with_outliers(model)
        with calibrated(changed, tmp_path / "m.gguf", ctx=128, chunks=8) as measured:
            found = smooth(changed, measured, alpha=alpha)
        smoothed = apply_transform(changed, found.transform)
        base = predictions(model, windows, eight_bits=False)
        exact, plain, better = (
            divergence(base, predictions(one, windows, eight_bits=rounded))
            for one, rounded in ((smoothed, False), (changed, True), (smoothed, True))
        )
    assert exact < 1e-6
    assert plain > 0.1
    # Measured: 0.0004, all of which the model without outliers has as well.
    assert better < 0.01 * plain


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_a_tokens_step_is_bounded_closely(spread: float) -> None:
    """Against what normal channels of those sizes do when they are drawn."""
    draws = np.random.default_rng(1)
    sizes = np.exp(spread * draws.standard_normal(512))
    tokens = draws.standard_normal((4000, 512)) * sizes
    columns = np.exp(draws.standard_normal(512))
    largest = np.abs(tokens).max(axis=0)
    real = np.sqrt(np.square(np.abs(tokens / columns).max(axis=1) / 127).mean())
    found = token_step(np.square(tokens).mean(axis=0), largest, columns)
    assert real <= found <= 1.3 * real


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_is_a_share(alpha: float) -> None:
    with open_model(MINI, vocabulary=False) as model, pytest.raises(UsageError, match="alpha is"):
        smooth(model, None, alpha=alpha)
