"""A model run layer by layer on weights that come and go is transformers' model, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import MODELS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IDS = [7, 5, 7, *range(300, 361)]
ROUNDING = 1e-5
"""Experts run one by one sum in another order than transformers' grouped product."""
_CONVOLVED = ("falcon-h1", "falcon-mamba", "mamba", "jamba")
"""Whose convolutions torch sums in an order that goes by where the weights lie in memory."""


def _logits(path: Path, config: dict[str, Any]) -> Any:
    from quantcli.layerwise.layerwise_model import LayerwiseModel
    from quantcli.model import open_model

    with open_model(path, vocabulary=False) as model:
        layers = LayerwiseModel(model, config)
        with layers.start() as start:
            hidden, calls = start.embed(IDS), start.calls(IDS)
        for index, call in enumerate(calls):
            with layers.filled(layers.layer_parameters(index)):
                hidden = layers.run(index, hidden, call)
        assert all(p.is_meta for p in layers.module.parameters())
        with layers.filled([*layers.outside_layers(), layers.head_name]):
            return layers.logits(layers.finish(hidden))


def _reference(folder: Path) -> tuple[Any, dict[str, Any]]:
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    kind = getattr(transformers, config["architectures"][0])
    model = kind.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([IDS])).logits, _config(folder)


def _config(folder: Path) -> dict[str, Any]:
    import json

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_checkpoint(name: str, checkpoint: Callable[..., Path]) -> None:
    wanted, config = _reference(checkpoint(name))
    found = _logits(checkpoint(name), config)
    bound = ROUNDING if MODELS[name].routed or name.startswith(_CONVOLVED) else 0
    assert (found - wanted).abs().max() <= bound


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "phi3", "qwen3-moe"])
def test_logits_of_a_gguf(
    name: str, checkpoint: Callable[..., Path], gguf: Callable[..., Path]
) -> None:
    wanted, config = _reference(checkpoint(name))
    # Of Gemma's norms llama.cpp stores 1 + w, which loses bits of w.
    bound = 1e-3 if name == "gemma3" else ROUNDING
    assert (_logits(gguf(name, "F32"), config) - wanted).abs().max() <= bound


def test_a_gguf_gives_the_weights_that_llama_cpp_sees(
    checkpoint: Callable[..., Path], gguf: Callable[..., Path]
) -> None:
    from gguf import GGUFReader, dequantize

    from quantcli.layerwise.layerwise_model import LayerwiseModel
    from quantcli.model import open_model

    path = gguf("llama", "Q4_0")
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    wanted = {
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "lm_head.weight": "output.weight",
    }
    with open_model(path, vocabulary=False) as model:
        layers = LayerwiseModel(model, _config(checkpoint("llama")))
        for name, source in wanted.items():
            tensor = stored[source]
            assert (
                layers.parameters.read(name) == dequantize(tensor.data, tensor.tensor_type)
            ).all()


def test_an_unknown_model_is_refused() -> None:
    from quantcli.errors import ArchitectureError
    from quantcli.layerwise.meta_model import build

    with pytest.raises(ArchitectureError, match="transformers cannot build this zebra model"):
        build({"model_type": "zebra"}, torch.float32)
