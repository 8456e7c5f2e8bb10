"""Every word of a rule, in a made-up family of layers of several kinds, both ways.

Mamba and attention alternate; the first layer's MLP is dense, and those after it have experts; a
block for predicting a token further follows the last layer; there is no output head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantcli.archs.base import Architecture
from quantcli.archs.config import Config, integer
from quantcli.archs.rules import Dims, KeyRule, Part, Rule, Share, every
from quantcli.checkpoint_view import CheckpointView, find_uses
from quantcli.errors import ArchitectureError
from quantcli.model import Model
from quantcli.pieces import NegativeExp
from quantcli.types import MetaValue, TensorInfo, array, u32

LAYERS = 4
CONFIG = {"architectures": ["Hybrid"], "hidden_size": 8, "ff": [12, 4, 4, 4]}


def _dims(config: Config) -> dict[str, int]:
    return {
        "layers": LAYERS, "vocab": 11, "hidden": integer(config, "hidden_size"), "inner": 16,
        "kernel": 3, "heads": 2, "head_dim": 4, "qkv": 24, "experts": 3, "rank": 5,
        "nope": 4, "value": 2, "kv_b": 12, "k_b_rows": 10, "v_b_rows": 4,
    }  # fmt: skip


def _layer_dims(config: Config, layer: int) -> Dims:
    ff = config["ff"][min(layer, LAYERS - 1)]
    return {"ff": ff, "gate_up": 2 * ff}


def _layer(name: str, source: str, *shape: str | int, **words: Any) -> Rule:
    return Rule(f"blk.{{i}}.{name}", f"layers.{{i}}.{source}", shape, **words)


def _rules(config: Config) -> tuple[Rule, ...]:
    mamba, attention = range(0, LAYERS, 2), range(1, LAYERS, 2)
    mixed = range(1, LAYERS)
    fused = ("heads", 3, "head_dim", "hidden")
    return (
        Rule("token_embd.weight", "embed.weight", ("vocab", "hidden")),
        _layer("attn_norm.weight", "norm.weight", "hidden"),
        _layer("ssm_in.weight", "mixer.in.weight", "inner", "hidden", layers=mamba),
        _layer(
            "ssm_conv1d.weight", "mixer.conv1d.weight", "inner", "kernel",
            stored=("inner", 1, "kernel"), layers=mamba,
        ),
        _layer("ssm_a", "mixer.A_log", "inner", 1, stored=("inner",), layers=mamba,
               parts=(Part(("inner",)),), pointwise=NegativeExp()),
        _layer(
            "attn_qkv.weight", "attn.qkv.weight", "qkv", "hidden", layers=attention,
            parts=tuple(Part(fused, cut=((1, i, i + 1),)) for i in range(3)),
        ),
        _layer(
            "attn_k_b.weight", "attn.kv_b.weight", "heads", "rank", "nope", layers=attention,
            stored=("kv_b", "rank"),
            parts=(Part(("heads", -1, "rank"), (0, 2, 1), ((1, 0, "nope"),)),),
        ),
        _layer(
            "attn_v_b.weight", "attn.kv_b.weight", "heads", "value", "rank", layers=attention,
            stored=("kv_b", "rank"), parts=(Part(("heads", -1, "rank"), (), ((1, "nope", 6),)),),
        ),
        _layer("ffn_gate.weight", "mlp.gate_up.weight", "ff", "hidden", layers=(0,),
               stored=("gate_up", "hidden"), parts=(every(0, 2, "ff", "hidden"),)),
        _layer("ffn_up.weight", "mlp.gate_up.weight", "ff", "hidden", layers=(0,),
               stored=("gate_up", "hidden"), parts=(every(1, 2, "ff", "hidden"),)),
        _layer("ffn_down.weight", "mlp.down.weight", "hidden", "ff", layers=(0,), transpose=True),
        *(
            _layer(
                f"ffn_{name}_exps.weight", "mlp.experts.gate_up", "experts", "ff", "hidden",
                layers=mixed, stored=("experts", "hidden", "gate_up"),
                parts=(Part(("experts", "hidden", "ff", 2), (0, 2, 3, 1), ((3, i, i + 1),)),),
            )
            for i, name in enumerate(("gate", "up"))
        ),
        _layer(
            "ffn_down_exps.weight", "mlp.experts.{e}.down.weight", "experts", "hidden", "ff",
            layers=mixed, fused=Share("layers.{i}.mlp.experts.down", transpose=True),
        ),
        Rule("blk.{i}.nextn.eh_proj.weight", "mtp.eh_proj.weight", ("hidden", "gate_up"),
             layers=(LAYERS,)),
        Rule("output_norm.weight", "norm_f.weight", ("hidden",)),
    )  # fmt: skip


def _keys(config: Config, dims: Dims) -> dict[str, MetaValue]:
    return {
        "block_count": u32(LAYERS + 1),
        "feed_forward_length": array("i32", list(config["ff"])),
    }


FAMILY = Architecture(
    name="hybrid",
    read_dims=_dims,
    read_layer_dims=_layer_dims,
    read_rules=_rules,
    to_keys=_keys,
    to_config=lambda header: header.named(ff="feed_forward_length"),
    keyed=(KeyRule("{arch}.xielu.alpha_p", "layers.{i}.act.alpha_p"),),
    renames=((r"^model\.", ""),),
)


class _Store:
    """Stored tensors in memory."""

    def __init__(self, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        self.arrays = arrays
        self.tensors = {
            name: TensorInfo(name, a.shape, "F32", a.nbytes, Path("f/x.safetensors"))
            for name, a in arrays.items()
        }

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        found = self.arrays[name]
        return found.reshape(-1, found.shape[-1])[start:stop]

    def read_columns(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        return np.ascontiguousarray(self.arrays[name][:, start:stop].T)

    def close(self) -> None:
        pass


def _stored(*, together: bool = False) -> dict[str, NDArray[np.float32]]:
    draw = np.random.default_rng(3)
    shapes = FAMILY.stored(CONFIG, ())
    found = {
        f"model.{name}": draw.random(shape, dtype=np.float32) for name, shape in shapes.items()
    }
    if together:
        for layer in range(1, LAYERS):
            stem = f"model.layers.{layer}.mlp.experts"
            apart = [found.pop(f"{stem}.{expert}.down.weight") for expert in range(3)]
            found[f"{stem}.down"] = np.ascontiguousarray(np.stack(apart).swapaxes(1, 2))
    return found


def _model(arrays: Mapping[str, NDArray[np.float32]]) -> Model:
    store = _Store(arrays)
    tensors = FAMILY.tensors(CONFIG, store.tensors)
    return Model("m", Path("f"), "hybrid", {}, tuple(tensors), store, from_gguf=False)


def _rows(model: Model) -> dict[str, NDArray[np.float32]]:
    return {
        tensor.name: model.read_rows(tensor, 0, tensor.rows).reshape(tensor.shape)
        for tensor in model.tensors
    }


def test_each_layer_has_the_tensors_of_its_kind() -> None:
    found = _rows(_model(_stored()))
    kinds = {
        layer: sorted(name.split(".", 2)[2] for name in found if name.startswith(f"blk.{layer}."))
        for layer in range(LAYERS + 1)
    }
    mamba = ["attn_norm.weight", "ssm_a", "ssm_conv1d.weight", "ssm_in.weight"]
    attention = ["attn_k_b.weight", "attn_norm.weight", "attn_qkv.weight", "attn_v_b.weight"]
    dense = ["ffn_down.weight", "ffn_gate.weight", "ffn_up.weight"]
    experts = ["ffn_down_exps.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight"]
    assert kinds[0] == sorted([*mamba, *dense])
    assert kinds[1] == kinds[3] == sorted([*attention, *experts])
    assert kinds[2] == sorted([*mamba, *experts])
    assert kinds[LAYERS] == ["nextn.eh_proj.weight"]
    assert "output.weight" not in found
    assert found["blk.0.ffn_up.weight"].shape == (12, 8)
    assert found["blk.1.ffn_up_exps.weight"].shape == (3, 4, 8)


def test_the_words_mean_what_they_say() -> None:
    stored = _stored()
    found = _rows(_model(stored))

    def at(layer: int, name: str) -> NDArray[np.float32]:
        return stored[f"model.layers.{layer}.{name}"]

    qkv = at(1, "attn.qkv.weight").reshape(2, 3, 4, 8)
    wanted = {
        "blk.0.ssm_a": -np.exp(at(0, "mixer.A_log").astype(np.float64))[:, None],
        "blk.2.ssm_conv1d.weight": at(2, "mixer.conv1d.weight")[:, 0],
        "blk.1.attn_qkv.weight": np.concatenate([qkv[:, i].reshape(8, 8) for i in range(3)]),
        "blk.1.attn_k_b.weight": at(1, "attn.kv_b.weight").reshape(2, 6, 5)[:, :4].swapaxes(1, 2),
        "blk.3.attn_v_b.weight": at(3, "attn.kv_b.weight").reshape(2, 6, 5)[:, 4:],
        "blk.0.ffn_gate.weight": at(0, "mlp.gate_up.weight")[::2],
        "blk.0.ffn_up.weight": at(0, "mlp.gate_up.weight")[1::2],
        "blk.0.ffn_down.weight": at(0, "mlp.down.weight").T,
        "blk.2.ffn_gate_exps.weight": at(2, "mlp.experts.gate_up")[:, :, ::2].swapaxes(1, 2),
        "blk.2.ffn_up_exps.weight": at(2, "mlp.experts.gate_up")[:, :, 1::2].swapaxes(1, 2),
        "blk.4.nextn.eh_proj.weight": stored["model.mtp.eh_proj.weight"],
    }
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)
    together = _rows(_model(_stored(together=True)))
    assert all(np.array_equal(found[name], together[name]) for name in found)


@pytest.mark.parametrize("together", [False, True])
def test_every_stored_element_is_used_once(together: bool) -> None:
    model = _model(_stored(together=together))
    used = {name: np.zeros(info.elements, int) for name, info in model.store.tensors.items()}
    for tensor in model.tensors:
        for piece in tensor.pieces:
            info = model.store.tensors[piece.source]
            numbers = np.arange(info.elements).reshape(info.shape)
            used[piece.source][replace(piece, pointwise=None).gather(numbers)] += 1
    for name, times in used.items():
        assert (times == (0 if "alpha_p" in name else 1)).all(), name


@pytest.mark.parametrize("together", [False, True])
def test_the_way_back_gives_what_was_stored(together: bool) -> None:
    model = _model(_stored(together=together))
    view = CheckpointView(
        model.store.tensors, find_uses(model.tensors), model.read_rows, lambda _, rows: rows,
        model.store,
    )  # fmt: skip
    for name, values in _stored(together=together).items():
        rows = values.reshape(-1, values.shape[-1])
        for start, stop in ((0, len(rows)), (len(rows) // 2, len(rows) // 2 + 1)):
            np.testing.assert_allclose(
                view.read_rows(name, start, stop), rows[start:stop], rtol=1e-5, err_msg=name
            )


def test_experts_are_pieces_of_their_own() -> None:
    tensors = {tensor.name: tensor for tensor in _model(_stored(together=True)).tensors}
    for name in ("ffn_gate_exps", "ffn_down_exps"):
        pieces = tensors[f"blk.2.{name}.weight"].pieces
        assert [piece.rows for piece in pieces] == [tensors[f"blk.2.{name}.weight"].shape[1]] * 3


def test_stored_names_are_known_by_layer() -> None:
    names = FAMILY.sources(CONFIG)
    assert names["blk.2.ffn_down_exps.weight"] == "layers.2.mlp.experts.{e}.down.weight"
    assert names["blk.4.nextn.eh_proj.weight"] == "mtp.eh_proj.weight"
    assert "blk.0.attn_qkv.weight" not in names


def test_key_values_come_from_tensors_and_by_layer() -> None:
    store = _Store(_stored())
    keys = FAMILY.metadata(CONFIG, store)
    assert keys["hybrid.feed_forward_length"] == array("i32", [12, 4, 4, 4])
    alphas = [float(store.arrays[f"model.layers.{i}.act.alpha_p"][0]) for i in range(LAYERS)]
    assert keys["hybrid.xielu.alpha_p"] == array("f32", alphas)
    assert "hybrid.xielu.alpha_p" not in FAMILY.metadata(CONFIG)
    places = FAMILY.key_places(CONFIG, store.tensors)
    assert places["model.layers.2.act.alpha_p"] == ("hybrid.xielu.alpha_p", 2)


REFUSED = {
    "attention is missing where it is due": (
        {"layers.1.attn.qkv.weight": None},
        r"tensor layers\.1\.attn\.qkv\.weight is missing",
    ),
    "a part's tensor is missing": (
        {"layers.3.attn.kv_b.weight": None},
        r"tensor layers\.3\.attn\.kv_b\.weight is missing",
    ),
    "attention where there is Mamba": (
        {"layers.2.attn.qkv.weight": (24, 8)},
        r"model\.layers\.2\.attn\.qkv\.weight of f/x\.safetensors is not part of Hybrid",
    ),
    "a dense MLP where there are experts": (
        {"layers.1.mlp.down.weight": (4, 8)},
        r"model\.layers\.1\.mlp\.down\.weight of f/x\.safetensors is not part of Hybrid",
    ),
    "another layer's size": (
        {"layers.0.mlp.down.weight": (4, 8)},
        "shape 4×8, but config.json makes it 12×8",
    ),
    "the block behind the last is missing": (
        {"mtp.eh_proj.weight": None},
        r"tensor mtp\.eh_proj\.weight is missing",
    ),
    "a block too many": (
        {"layers.4.norm.weight": (8,)},
        r"model\.layers\.4\.norm\.weight of f/x\.safetensors is not part of Hybrid",
    ),
    "an output head": ({"lm_head.weight": (11, 8)}, "lm_head.weight .* is not part of Hybrid"),
    "a key-value's tensor is missing": (
        {"layers.2.act.alpha_p": None},
        r"tensor layers\.2\.act\.alpha_p is missing",
    ),
    "a key-value of two numbers": (
        {"layers.2.act.alpha_p": (2,)},
        "shape 2, but config.json makes it 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_left_over_and_missing_tensors_are_refused(name: str) -> None:
    changes, message = REFUSED[name]
    stored = _stored()
    for tensor, shape in changes.items():
        stored.pop(f"model.{tensor}", None)
        if shape is not None:
            stored[f"model.{tensor}"] = np.zeros(shape, np.float32)
    with pytest.raises(ArchitectureError, match=message):
        FAMILY.tensors(CONFIG, _Store(stored).tensors)


def test_the_made_up_names_follow_llamas_order() -> None:
    layers = [re.match(r"blk\.(\d+)", tensor.name) for tensor in _model(_stored()).tensors]
    numbers = [int(found[1]) if found else -1 for found in layers]
    assert numbers == sorted(numbers)
