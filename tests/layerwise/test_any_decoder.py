"""Decoders of any family run layer by layer: several windows, whatever their layers are given."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny.untabled import UNTABLED

import quantcli
from quantcli.errors import ArchitectureError, QuantcliError
from quantcli.model import open_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Checkpoint = Callable[..., Path]

NOVEL = Path(__file__).parent.parent / "data" / "pride-and-prejudice.txt"
IDS = np.random.default_rng(3).integers(2, 4000, (3, 40)).astype(np.int32)

VARYING = {"zamba2", "gemma4-small"}
"""Families whose layers are called with more than hidden states of a text."""


@contextmanager
def _walk(folder: Path) -> Any:
    from quantcli.layerwise.hidden_states import HiddenStateCache
    from quantcli.layerwise.layerwise_model import LayerwiseModel
    from quantcli.layerwise.walk import LayerWalk

    with open_model(folder, vocabulary=False, table=False) as model:
        layers = LayerwiseModel(model, model.config)
        states = HiddenStateCache((*IDS.shape, layers.hidden_size), layers.dtype)
        yield LayerWalk(layers, IDS, states)


def _whole(folder: Path) -> list[Any]:
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        windows = [torch.tensor(window[None], dtype=torch.int64) for window in IDS]
        return [model(window, use_cache=False).logits[0] for window in windows]


@pytest.mark.parametrize("name", [*UNTABLED, "gemma4-small"])
def test_every_window_has_the_logits_of_the_whole_model(name: str, checkpoint: Checkpoint) -> None:
    from quantcli.layerwise.walk import run_silently

    folder = checkpoint(name)
    with _walk(folder) as walk:
        run_silently(walk.forward())
        assert walk.calls.varies is (name in VARYING)
        with walk.head(weights=True):
            found = [walk.model.logits(walk.model.finish(walk.get(n)))[0] for n in walk.windows]
    for ours, theirs in zip(found, _whole(folder), strict=True):
        assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.std())


def test_gradients_see_what_earlier_layers_share(checkpoint: Checkpoint) -> None:
    """Backwards every layer gets, for each window, what it got forwards."""
    from quantcli.layerwise.hidden_states import LayerInputs
    from quantcli.layerwise.walk import LayerWalk, run_silently

    with _walk(checkpoint("gemma4-small")) as opened:
        model = opened.model
        values = np.zeros((len(model.layers) + 1, *IDS.shape, model.hidden_size), np.float32)
        walk = LayerWalk(model, IDS, LayerInputs(values, model.dtype))
        run_silently(walk.forward())
        outputs = values[-1].copy()
        last = len(model.layers) - 1
        with model.filled(model.layer_parameters(last)):
            for window in walk.windows:
                hidden = torch.from_numpy(values[last, window][None])
                again = model.run(last, hidden, walk.calls.of(last, window))
                assert np.array_equal(again[0].numpy(), outputs[window])


def test_a_layer_that_gets_more_than_hidden_states_is_refused(checkpoint: Checkpoint) -> None:
    from quantcli.layerwise.check_layers import check_layers

    with _walk(checkpoint("gptj")) as walk:
        check_layers(walk.model, IDS[0].tolist())
        second = walk.model.layers[1]
        own = type(second).forward
        second.forward = lambda hidden, *args, **named: own(second, hidden + 1, *args, **named)
        with pytest.raises(ArchitectureError, match="layer 1 of GPTJModel gets more than hidden"):
            check_layers(walk.model, IDS[0].tolist())


def test_layers_that_do_not_follow_one_another_are_refused(checkpoint: Checkpoint) -> None:
    with _walk(checkpoint("helium")) as walk:
        decoder = walk.model.decoder
        own = decoder.layers[1].forward
        decoder.forward = lambda input_ids, use_cache: own(decoder.embed_tokens(input_ids))
        with pytest.raises(ArchitectureError, match="they do not simply follow one another"):
            walk.embed()


def test_a_kind_that_transformers_does_not_know_is_one_sentence(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for path in checkpoint("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "our_own", "architectures": ["OurOwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureError) as refused:
        quantcli.calibrate(folder, NOVEL, output=tmp_path / "c.gguf", ctx=64, chunks=2)
    expected = (
        "transformers cannot build this our_own model: Unrecognized model identifier: our_own"
    )
    assert refused.value.message == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptj", "opt", "minimax", "xglm"])
def test_gptq_rounds_every_matrix_and_leaves_less_divergence(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(name)
    done = quantcli.calibrate(source, NOVEL, output=tmp_path / "c.gguf", ctx=64, chunks=4)
    assert any("there is no table for" in note.message for note in done.notes)
    options: dict[str, Any] = {"to": "compressed-tensors", "group_size": 32}
    nearest = quantcli.quantize(source, tmp_path / "nearest", **options)
    rounded = quantcli.quantize(
        source, tmp_path / "gptq", method="gptq", calibrate=[], chunks=12, **options
    )
    names = {tensor["tensor"] for tensor in rounded.document["tensors"]}
    assert names <= done.calibration.squares.keys()
    with open_model(source, vocabulary=False, table=False) as model:
        assert names == {t.name for t in model.tensors if t.name.startswith("blk.")}
    found = quantcli.evaluate(
        [nearest.paths[0], rounded.paths[0]], NOVEL, reference=source, ctx=128, chunks=6
    )
    before, after = (result["kld"]["value"] for result in found.document["results"])
    assert after < before


@pytest.mark.parametrize("method", ["awq", "smoothquant", "rotate"])
def test_transforms_are_refused_where_nothing_says_what_they_may_change(
    method: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    to = {"awq": "awq", "smoothquant": "compressed-tensors", "rotate": "compressed-tensors"}[method]
    extra = {"activations": "int8"} if method == "smoothquant" else {"group_size": 32}
    with pytest.raises(QuantcliError) as refused:
        quantcli.quantize(
            checkpoint("helium"), tmp_path / "out", to=to, method=method, calibrate=[], chunks=4,
            **extra,
        )  # fmt: skip
    assert "HeliumForCausalLM" in refused.value.message


@pytest.mark.slow
def test_weights_that_layers_share_are_summed_up_and_rounded_once(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, options = checkpoint("zamba2"), {"ctx": 32, "chunks": 2, "data": NOVEL}
    done = quantcli.calibrate(source, output=tmp_path / "c.gguf", **options)
    counts = {name: int(count.sum()) for name, count in done.calibration.counts.items()}
    assert counts["blk.1.shared_transformer.self_attn.q_proj.weight"] == 2 * 64
    assert counts["blk.0.ssm_in.weight"] == 64
    rounded = quantcli.quantize(
        source, tmp_path / "w4", to="compressed-tensors", group_size=32, method="gptq",
        calibrate=[], chunks=4,
    )  # fmt: skip
    names = [tensor["tensor"] for tensor in rounded.document["tensors"]]
    assert len(set(names)) == len(names)
    assert any("serves several layers" in note.message for note in rounded.notes)
