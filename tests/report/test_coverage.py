"""What an importance matrix covers, counted again by hand."""

from __future__ import annotations

import numpy as np
import pytest
from support.broken import legacy, legacy_entry
from support.gguf_files import write_imatrix

from quantcli.report.coverage import coverage_document, coverage_tables, read_coverage


@pytest.fixture
def experts(tmp_path):
    """Four experts, two of them unseen, and a plain matrix with three columns at zero."""
    sums = np.arange(1, 33, dtype=np.float32).reshape(4, 8)
    counts = np.array([[2], [0], [4], [0]], np.float32)
    plain = np.array([[0, 0, 0, 8, 16]], np.float32)
    return write_imatrix(
        tmp_path / "m.gguf",
        {
            "blk.0.ffn_up_exps.weight": (sums, counts),
            "blk.0.attn_q.weight": (plain, np.array([[8]], np.float32)),
        },
    )


def test_experts_without_input_and_dead_columns_are_counted(experts):
    found = read_coverage(experts)
    assert (found.form, found.chunks, found.chunk_size) == ("GGUF", 40, 512)
    assert found.datasets == ("wiki.train.raw",)
    by_name = {entry.name: entry for entry in found.entries}
    stack = by_name["blk.0.ffn_up_exps.weight"]
    assert (stack.matrices, stack.columns, stack.unseen, stack.zero_columns) == (4, 8, 2, 0)
    plain = by_name["blk.0.attn_q.weight"]
    assert (plain.unseen, plain.zero_columns) == (0, 3)
    assert (plain.low, plain.high, plain.mean) == (0.0, 2.0, pytest.approx(0.6))
    assert found.unseen == 2
    assert found.zero_share == 3 / 37


def test_the_legacy_form_does_not_tell_what_was_unseen(tmp_path):
    path = tmp_path / "m.dat"
    path.write_bytes(legacy(legacy_entry(b"blk.0.attn_q.weight", [0.0, 2.0, 4.0], calls=2)))
    found = read_coverage(path)
    assert found.form == "legacy .dat"
    assert found.unseen is None
    assert found.entries[0].high == 2.0
    assert found.entries[0].zero_columns == 1
    rows = dict(coverage_tables(found)[0].rows)
    assert rows["Unseen matrices"] == "not recorded in this form"
    assert rows["Collected on"] == "not told"


def test_tables_and_document_say_the_same(experts):
    found = read_coverage(experts)
    list_of_facts, table = coverage_tables(found)
    assert dict(list_of_facts.rows)["Collected on"] == "40 chunks of 512 tokens"
    assert dict(list_of_facts.rows)["Unseen matrices"] == "2"
    assert [row[0] for row in table.rows] == [entry.name for entry in found.entries]
    assert all(len(row) == len(table.columns) for row in table.rows)
    document = coverage_document(found, found.entries[:1])
    assert document["unseen_matrices"] == 2
    assert [entry["name"] for entry in document["entries"]] == [found.entries[0].name]
