"""Fold groups: which tensors meet where, and that nothing is left behind in silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from quantcli.archs import ARCHITECTURES, find_folds
from quantcli.archs.fold import FoldGroup, Producer, fold_groups
from quantcli.errors import ArchitectureError
from quantcli.model import Model, open_model
from quantcli.types import OutputTensor

pytest.importorskip("torch")


def groups(model: Model, *more: OutputTensor) -> dict[str, FoldGroup]:
    folds = find_folds(model.arch)
    found = fold_groups(folds, model.arch, model.metadata, [*model.tensors, *more])
    return {group.name: group for group in found}


UNGROUPED = {
    "afmoe", "bert", "cohere2moe", "eurobert", "gemma3n", "gemma4", "gpt-oss", "granite_swa",
    "hunyuan-moe",
    "jina-bert-v2", "jina-bert-v3", "laguna", "llama4", "mimo2", "modern-bert", "muse-glimmer",
    "nomic-bert", "qwen2moe", "step35", "t5", "t5encoder",
}  # fmt: skip
"""Architectures that no transform takes: encoders, which no method calibrates, and those whose
gates, shared experts or windows of their own no fold group describes yet."""


def test_every_other_family_declares_groups() -> None:
    families = {ARCHITECTURES.get(name).name for name in ARCHITECTURES}
    assert {name for name in families if not find_folds(name).rules} == UNGROUPED


def test_values_belong_to_key_value_heads(checkpoint: Callable[..., Path]) -> None:
    with open_model(checkpoint("llama-biases"), vocabulary=False) as model:
        found = groups(model)["blk.1.attn_v"]
    assert (found.channels, found.heads, found.sharers) == (64, 2, 2)
    assert found.producers == (
        Producer("blk.1.attn_v.weight", 0, 64),
        Producer("blk.1.attn_v.bias", 0, 64),
    )
    assert found.consumers == ("blk.1.attn_output.weight",)


def test_fused_matrices_are_made_by_their_last_rows(checkpoint: Callable[..., Path]) -> None:
    with open_model(checkpoint("phi3"), vocabulary=False) as model:
        found = groups(model)
    assert found["blk.0.attn_qkv"].producers == (Producer("blk.0.attn_qkv.weight", 96, 128),)
    assert found["blk.0.ffn_up"].producers == (Producer("blk.0.ffn_up.weight", 96, 192),)


def test_a_norm_feeds_the_router_and_every_expert(checkpoint: Callable[..., Path]) -> None:
    with open_model(checkpoint("mixtral"), vocabulary=False) as model:
        found = groups(model)
    assert {name.split(".")[2] for name in found["blk.0.ffn_norm"].consumers} == {
        "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps",
    }  # fmt: skip
    assert found["blk.0.ffn_up_exps"].matrices == 4


@pytest.mark.parametrize(("name", "head"), [("llama", True), ("llama-tied", False)])
def test_a_tied_head_has_no_group(name: str, head: bool, checkpoint: Callable[..., Path]) -> None:
    with open_model(checkpoint(name), vocabulary=False) as model:
        assert ("output_norm" in groups(model)) == head


def test_a_matrix_that_no_rule_names_is_refused(checkpoint: Callable[..., Path]) -> None:
    with open_model(checkpoint("llama"), vocabulary=False) as model:
        stray = replace(model.tensors[-1], name="blk.1.ffn_extra.weight", shape=(8, 256))
        with pytest.raises(ArchitectureError, match=r"blk\.1\.ffn_extra\.weight is not among"):
            groups(model, stray)
        with pytest.raises(ArchitectureError, match="no fold groups of zebra models"):
            fold_groups(find_folds("zebra"), "zebra", model.metadata, model.tensors)
