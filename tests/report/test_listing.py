"""Filters, orders and the detailed tables."""

from __future__ import annotations

import numpy as np
import pytest
from support.gguf_files import TEMPLATE, write_model

from quantcli.errors import UsageError
from quantcli.report import listing
from quantcli.report.opening import open_subject
from quantcli.report.stats import measure_rows
from quantcli.sources.resolve import resolve
from quantcli.types import MetaValue


@pytest.fixture
def model(tmp_path):
    write_model(tmp_path / "m.gguf")
    with open_subject(resolve(str(tmp_path / "m.gguf")), "m") as subject:
        yield subject


def _names(tensors) -> list[str]:
    return [tensor.info.name for tensor in tensors]


def test_blocks_are_sorted_as_numbers(model):
    names = _names(listing.choose_tensors(model, None, "name"))
    assert names.index("blk.2.attn_q.weight") < names.index("blk.10.attn_q.weight")


@pytest.mark.parametrize(
    ("order", "value"),
    [
        ("size", lambda t: -t.info.nbytes),
        ("weights", lambda t: -t.info.elements),
        ("bits", lambda t: -t.bits_per_weight),
        ("dtype", lambda t: t.info.dtype),
        ("shape", lambda t: t.info.shape),
    ],
)
def test_orders(model, order, value):
    chosen = listing.choose_tensors(model, None, order)
    assert [value(t) for t in chosen] == sorted(value(t) for t in model.tensors)


def test_without_an_order_the_file_decides(model):
    assert _names(listing.choose_tensors(model, None, None)) == _names(model.tensors)


def test_a_filter_finds_stored_and_gguf_names(mini):
    with open_subject(resolve(str(mini)), "mini") as subject:
        for pattern in (r"layers\.1\.mlp\.up", r"^blk\.1\.ffn_up"):
            chosen = listing.choose_tensors(subject, listing.compile_filter(pattern), None)
            assert _names(chosen) == ["model.layers.1.mlp.up_proj.weight"]
        sources = listing.choose_sources(subject, chosen, None)
        assert [source.name for source in sources] == ["blk.1.ffn_up.weight"]


def test_a_filter_that_is_no_expression_is_wrong_usage():
    with pytest.raises(UsageError, match=r"--filter '\(' is not a regular expression"):
        listing.compile_filter("(")


@pytest.mark.parametrize(
    ("order", "stats", "message", "hint"),
    [
        ("sise", False, "there is no order named 'sise'", "did you mean size?"),
        ("zzz", False, "there is no order named 'zzz'", "known: name, size"),
        ("kurtosis", False, "--sort kurtosis needs the weights", "add --stats"),
    ],
)
def test_an_unknown_order_is_wrong_usage(order, stats, message, hint):
    with pytest.raises(UsageError) as caught:
        listing.check_order(order, stats=stats)
    assert caught.value.message == message
    assert hint in caught.value.hint


@pytest.mark.parametrize("order", listing.SORT_KEYS)
def test_every_order_is_accepted_with_statistics(order):
    listing.check_order(order, stats=True)


RNG = np.random.default_rng(3)
STATS = {
    "even": measure_rows(RNG.uniform(-1, 1, (40, 100))),
    "bell": measure_rows(RNG.standard_normal((40, 100)) * 0.1),
    "spike": measure_rows(np.where(np.arange(4000).reshape(40, 100) == 77, 50.0, 0.01)),
    "zero": measure_rows(np.zeros((40, 100))),
}


@pytest.mark.parametrize(
    ("order", "names"),
    [
        (None, ["even", "bell", "spike", "zero"]),
        ("kurtosis", ["spike", "bell", "even", "zero"]),
        ("outliers", ["spike", "even", "bell", "zero"]),
        ("std", ["spike", "even", "bell", "zero"]),
        ("max", ["spike", "even", "bell", "zero"]),
    ],
)
def test_statistics_are_sorted_from_the_largest_down(order, names):
    assert [name for name, _ in listing.sort_stats(STATS, order)] == names


def test_the_channel_that_stands_out_is_named():
    table = listing.channel_table(STATS.items(), 3)
    assert table.rows[0] == ("spike", "77", "50", "5000.0 x", "1")
    assert len(table.rows) == 3


def test_vectors_have_no_channels():
    vector = {"norm": measure_rows(RNG.standard_normal((1, 64)))}
    assert listing.channel_table(vector.items(), 3).rows == ()


def test_a_column_for_broken_numbers_appears_only_when_there_are_some(model):
    sources = model.sources[:1]
    good = measure_rows(np.ones((2, 4)))
    bad = measure_rows(np.array([[1.0, np.nan]]))
    name = sources[0].name
    headers = [
        [column.header for column in listing.stats_table(sources, [(name, stats)]).columns]
        for stats in (good, bad)
    ]
    assert "Not finite" not in headers[0]
    assert "Not finite" in headers[1]


def test_key_values_are_cut_short_unless_asked_for(model):
    short = {row[0]: row for row in listing.key_value_table(model.metadata, full=False).rows}
    whole = {row[0]: row for row in listing.key_value_table(model.metadata, full=True).rows}
    assert short["tokenizer.ggml.tokens"][2] == "[t0, t1, t2, t3, t4, t5, ... 1,000 in all]"
    assert whole["tokenizer.ggml.tokens"][2].endswith(", t998, t999]")
    assert len(short["tokenizer.chat_template"][2]) == 60
    assert whole["tokenizer.chat_template"][2] == TEMPLATE
    assert set(short) == set(whole) == set(model.metadata)
    assert listing.key_value_table(model.metadata, full=False).note
    assert listing.key_value_table(model.metadata, full=True).note is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (MetaValue("f32", 1e-05), "1e-05"),
        (MetaValue("bool", True), "True"),
        (MetaValue("[str]", [b"\xff", "a"]), "[\\xff, a]"),
        (MetaValue("[i32]", []), "[]"),
        (MetaValue("[i32]", list(range(6))), "[0, 1, 2, 3, 4, 5]"),
    ],
)
def test_a_value_in_a_line(value, text):
    assert listing.value_text(value) == text


def test_every_row_has_every_column(model, mini):
    with open_subject(resolve(str(mini)), "mini") as checkpoint:
        for subject in (model, checkpoint):
            table = listing.tensor_table(subject, subject.tensors)
            assert len(table.rows) == len(subject.tensors)
            assert all(len(row) == len(table.columns) for row in table.rows)
