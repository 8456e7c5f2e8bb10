"""REGEX=TYPE: what is found, what is refused, against C++'s regular expressions in llama.cpp."""

from pathlib import Path

import pytest
from support.llama_plan import Shape, dry_run, write_hollow
from support.model_shapes import MODELS

from quantcli.errors import UsageError
from quantcli.plan.patterns import first_match, parse_format, parse_tensor_type


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shape, Path]:
    model = MODELS["llama-12"]()
    return model, write_hollow(tmp_path_factory.mktemp("patterns") / "model.gguf", model)


@pytest.mark.parametrize(
    "pattern",
    [
        "attn_v", "ATTN_V", r"blk\.1\.", r"^blk\.(0|11)\.ffn", r"\d{2}\.attn_[qk]", "ffn_(?=up)",
        r"[[:digit:]]{2}", r"[^[:alpha:]]\.", r"^(?!blk)", r"weight$", r"q\b", r"\w+\.\w+\.attn_k",
        "A-Z", "[A-C]lk", r"(attn|ffn)_\w+\.weight", "nothing",
    ],
)  # fmt: skip
def test_the_same_tensors_are_found(source: tuple[Shape, Path], pattern: str) -> None:
    _, path = source
    real = {
        name
        for name, type_name in dry_run(path, "Q8_0", tensor_types=[(pattern, "Q4_1")])
        if type_name == "Q4_1"
    }
    parsed = parse_tensor_type(f"{pattern}=Q4_1")
    quantized = {name for name, type_name in dry_run(path, "Q8_0") if type_name == "Q8_0"}
    assert {name for name in quantized if parsed.matches(name)} == real


def test_a_class_of_what_is_no_digit_is_kept() -> None:
    parsed = parse_tensor_type(r"blk\.\D=Q8_0")
    assert not parsed.matches("blk.1.attn_q.weight")
    assert parsed.matches("blk.x.attn_q.weight")


def test_the_type_follows_the_last_equals_sign() -> None:
    parsed = parse_tensor_type("attn_(?=v)=q5_k")
    assert parsed.format == "Q5_K"
    assert parsed.matches("blk.0.attn_v.weight")


def test_the_first_match_wins() -> None:
    patterns = [parse_tensor_type("attn=Q8_0"), parse_tensor_type("attn_v=Q4_0")]
    found = first_match(patterns, "blk.0.attn_v.weight")
    assert found is patterns[0]
    assert first_match(patterns, "output.weight") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attn_v", "not REGEX=TYPE"),
        ("=Q8_0", "not REGEX=TYPE"),
        ("attn_v=", "not REGEX=TYPE"),
        ("attn_(v=Q8_0", "not a regular expression"),
        ("[[a]=Q8_0", "not a regular expression"),
        ("[[:number:]]=Q8_0", r"no class \[:number:\]"),
        ("attn_v=Q4_K_M", r"no block format named 'Q4_K_M'.*Q4_K"),
        ("attn_v=I32", "no block format named 'I32'"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_tensor_type(text)


def test_formats_in_any_case() -> None:
    assert parse_format("q6_k") == "Q6_K"
