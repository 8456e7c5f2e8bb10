"""``--keep PLACES=TYPE``: what the places mean, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantcli.errors import UsageError
from quantcli.model import open_model
from quantcli.plan.planner import make_plan
from quantcli.plan.recipe import Recipe

MINI = Path(__file__).parents[1] / "data" / "bookworm-mini"


def _formats(**recipe: object) -> dict[str, str]:
    with open_model(MINI) as model:
        plan = make_plan(model.tensors, model.metadata, Recipe(**recipe))
    return {item.tensor.name: item.format for item in plan.items}


def test_places_are_the_ends_of_the_model() -> None:
    plain = _formats(type="Q4_K_S")
    kept = _formats(type="Q4_K_S", keep=("first,last=Q8_0", "embeddings=Q5_K"))
    for name, kind in kept.items():
        quantized = name.endswith(".weight") and "norm" not in name
        if name.startswith(("blk.0.", "blk.3.")) and quantized:
            assert kind == "Q8_0"
        elif name == "token_embd.weight":
            assert kind == "Q5_K"
        else:
            assert kind == plain[name]


def test_types_by_name_win() -> None:
    kept = _formats(
        type="Q4_K_S", keep=("first,embeddings=Q8_0",), tensor_types=("attn_v=Q6_K",),
        token_embedding_type="Q5_1",
    )  # fmt: skip
    assert kept["blk.0.attn_v.weight"] == "Q6_K"
    assert kept["blk.0.attn_q.weight"] == "Q8_0"
    assert kept["token_embd.weight"] == "Q5_1"


def test_a_tied_head_is_the_embedding() -> None:
    assert _formats(type="Q4_K_S", keep=("head=Q8_0",))["token_embd.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("first", "is not PLACES=TYPE"),
        ("frist=Q8_0", "did you mean first"),
        ("first=Q9_0", "no block format"),
    ],
)
def test_what_is_no_place_is_refused(entry: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _formats(type="Q4_K_S", keep=(entry,))
