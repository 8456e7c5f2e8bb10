"""Which entries of an importance matrix are used, refused or missed."""

import pytest

from quantcli.errors import PlanError
from quantcli.plan.importance import applies, is_required, refuse_foreign, select_entries
from quantcli.types import OutputTensor

DENSE = OutputTensor("blk.0.ffn_down.weight", (256, 512), "F32")
EXPERTS = OutputTensor("blk.0.ffn_down_exps.weight", (8, 256, 512), "F32")
EMBEDDING = OutputTensor("token_embd.weight", (320, 256), "F32")

NAMES = ("blk.0.attn_q.weight", "blk.1.attn_k.weight", "output.weight")
ENTRIES = dict.fromkeys(NAMES, (1, 4))


def test_filters_are_parts_of_names() -> None:
    assert list(select_entries(ENTRIES, include=["attn_q", "output"])) == [
        "blk.0.attn_q.weight",
        "output.weight",
    ]
    assert list(select_entries(ENTRIES, exclude=["blk.0", "out"])) == ["blk.1.attn_k.weight"]
    assert select_entries(ENTRIES) == ENTRIES


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [(DENSE, (1, 512)), (EXPERTS, (8, 512)), (EXPERTS, (1, 8 * 512)), (EMBEDDING, (1, 256))],
)
def test_an_entry_of_the_right_length_applies(tensor: OutputTensor, shape: tuple[int, int]) -> None:
    assert applies({tensor.name: shape}, tensor)


@pytest.mark.parametrize(
    ("tensor", "shape", "message"),
    [
        (DENSE, (1, 256), "expected 512 weights, found 256 weights"),
        (DENSE, (2, 512), "expected 512 weights, found 2 matrices of 512 weights"),
        (EXPERTS, (4, 512), "expected 8 matrices of 512 weights, found 4 matrices of 512"),
        (EXPERTS, (4, 1024), "expected 8 matrices of 512 weights, found 4 matrices of 1024"),
        (EXPERTS, (1, 512), "expected 8 matrices of 512 weights, found 512 weights"),
    ],
)
def test_an_entry_of_another_length_is_refused(
    tensor: OutputTensor, shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        applies({tensor.name: shape}, tensor)
    assert tensor.name in caught.value.message


def test_an_odd_entry_for_the_embedding_is_not_used() -> None:
    assert not applies({"token_embd.weight": (1, 320)}, EMBEDDING)


def test_no_entry_is_no_error() -> None:
    assert not applies({}, DENSE)


def test_a_matrix_for_another_model_is_refused() -> None:
    refuse_foreign({DENSE.name: (1, 1)}, [DENSE, EMBEDDING])
    with pytest.raises(PlanError, match=r"another model.*blk\.0\.ffn_dwn\.weight.*ffn_down"):
        refuse_foreign({"blk.0.ffn_dwn.weight": (1, 512)}, [DENSE, EMBEDDING])
    with pytest.raises(PlanError, match="is empty"):
        refuse_foreign({}, [DENSE])


def test_what_cannot_go_without(every_format: None) -> None:
    name = "blk.0.attn_q.weight"
    assert is_required(name, "IQ2_S", "IQ2_M")
    assert is_required(name, "Q2_K", "Q2_K_S")
    assert not is_required(name, "Q2_K", "Q2_K")
    assert not is_required("output.weight", "Q2_K", "Q2_K_S")
    assert not is_required("token_embd.weight", "IQ2_S", "IQ2_M")
    assert is_required("token_embd.weight", "IQ2_XS", "IQ2_XS"), "its encoder cannot do without"
