"""What a machine leaves a model, and how sizes and contexts are written."""

from __future__ import annotations

import pytest

from quantcli.errors import UsageError
from quantcli.fit.machine import find_machine, gib, parse_context, parse_memory

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24G", 24 * GIB), ("24 GB", 24 * GIB), ("24", 24 * GIB), ("1.5gib", 3 * GIB // 2),
     ("512M", 2**29), ("2T", 2**41)],
)  # fmt: skip
def test_sizes_are_powers_of_two(text, nbytes):
    assert parse_memory(text) == nbytes


@pytest.mark.parametrize("text", ["", "G", "-4G", "0", "24X", "4,5G"])
def test_no_size(text):
    with pytest.raises(UsageError, match="is no size of a memory"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("text", "tokens"), [("32k", 32768), ("8192", 8192), (4096, 4096), ("1M", 2**20)]
)
def test_contexts(text, tokens):
    assert parse_context(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "0", "-1", "8.5k", "many"])
def test_no_context(text):
    with pytest.raises(UsageError, match="is no number of tokens"):
        parse_context(text)


@pytest.mark.parametrize(
    ("size", "working_set_mib"),
    # recommendedMaxWorkingSetSize as llama.cpp's users posted it: M1 16 GB, M1 Max 32 and 64 GB.
    [("16G", 10922), ("32G", 21845), ("64G", 49152)],
)
def test_a_mac_keeps_what_metal_says(size, working_set_mib):
    assert find_machine(size, "mac").usable // 2**20 == working_set_mib - 1024


def test_margins():
    assert find_machine("24G").usable == 23 * GIB
    assert find_machine("24G", "cpu").usable == 22 * GIB
    assert find_machine("24G", "GPU", "32G").ram == 30 * GIB
    assert find_machine("2G").usable == 3 * GIB // 2


def test_no_machine():
    with pytest.raises(UsageError) as caught:
        find_machine("24G", "max")
    assert caught.value.hint == "did you mean mac?"
    with pytest.raises(UsageError, match="--ram is the memory beside a GPU"):
        find_machine("24G", "mac", "32G")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(24 * GIB, "24.0"), (0.04 * GIB, "0.04"), (4.57 * GIB, "4.6"), (125.4 * GIB, "125")],
)
def test_gib(nbytes, text):
    assert gib(nbytes) == text
