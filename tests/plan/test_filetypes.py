"""File types against llama.cpp's own numbers and our own block formats."""

import pytest
from gguf import LlamaFileType
from support.llama_quantize import FILE_TYPES

from quantcli.errors import UsageError
from quantcli.formats import FORMATS
from quantcli.plan.filetypes import (
    TYPE_OF_BITS,
    file_type_by_id,
    file_types,
    find_file_type,
    type_of_bits,
)
from quantcli.plan.importance import is_required
from quantcli.plan.mixture import RULES

MAIN = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q2_K_S", "Q3_K_S",
    "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K",
]  # fmt: skip


def test_the_main_types_can_be_chosen() -> None:
    assert set(MAIN) <= {each.name for each in file_types()}


def test_every_type_has_the_number_of_llama_cpp(every_format: None) -> None:
    ours = {each.name: each.id for each in file_types()}
    assert ours == {name: number for name, number in FILE_TYPES.items() if name != "GUESSED"}


def test_gguf_knows_the_numbers_too(every_format: None) -> None:
    known = {int(member) for member in LlamaFileType}
    assert {each.id for each in file_types() if each.name not in ("Q1_0", "Q2_0")} <= known


def test_only_types_whose_block_formats_exist_are_listed() -> None:
    for each in file_types():
        assert each.base in FORMATS
        assert all(rule.format in FORMATS for rule in RULES if each.name in rule.types)


def test_a_new_block_format_brings_its_types(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = dict(FORMATS._own)
    monkeypatch.setattr(FORMATS, "_own", {n: t for n, t in targets.items() if n != "Q6_K"})
    names = {each.name for each in file_types()}
    assert "Q6_K" not in names
    assert "Q4_K_M" not in names, "its mixture needs Q6_K"
    assert "Q4_K_S" in names


@pytest.mark.parametrize("name", MAIN)
def test_names_in_any_case(name: str) -> None:
    assert find_file_type(name.lower()).name == name
    assert find_file_type(f" {name} ").name == name


@pytest.mark.parametrize("name", ["Q3_K", "q4_k", "Q5_K"])
def test_short_names_mean_the_medium_mixture(name: str) -> None:
    assert find_file_type(name).name == f"{name.upper()}_M"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("Q4_KM", "Q4_K_M"), ("q8", "Q8_0"), ("Q4-K-S", "Q4_K_S"), ("BF-16", "BF16")],
)
def test_a_near_miss_is_suggested(name: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_file_type(name)
    assert caught.value.message == f"there is no type {name}"
    assert caught.value.hint == f"did you mean {meant}?"


def test_something_else_lists_the_types() -> None:
    with pytest.raises(UsageError, match=r"there is no type zzz.*known: .*Q4_K_M"):
        find_file_type("zzz")


def test_a_type_without_an_encoder_is_not_called_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FORMATS, "_own", {"F32": "", "Q8_0": "", "Q6_K": ""})
    with pytest.raises(UsageError, match="there is no encoder for type Q4_0"):
        find_file_type("q4_0")


def test_bits() -> None:
    wanted = {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M", 5: "Q5_K_M", 6: "Q6_K", 8: "Q8_0", 16: "BF16"}
    assert {bits: type_of_bits(bits) for bits in TYPE_OF_BITS} == wanted
    with pytest.raises(UsageError, match="no type of 7 bits"):
        type_of_bits(7)


def test_types_by_number() -> None:
    found = file_type_by_id(15)
    assert found is not None
    assert found.name == "Q4_K_M"
    assert file_type_by_id(99) is None


def test_the_types_that_need_an_importance_matrix_are_those_whose_mixture_does(
    every_format: None,
) -> None:
    name = "blk.5.attn_k.weight"
    for each in file_types():
        formats = {each.base} | {rule.format for rule in RULES if each.name in rule.types}
        assert each.needs_importance == any(
            is_required(name, block_format, each.name) for block_format in formats
        ), each.name
