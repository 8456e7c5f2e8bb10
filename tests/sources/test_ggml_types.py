"""The table of tensor types is ggml's, and the block formats agree with it."""

from __future__ import annotations

import pytest
from support import ggml_reader

from quantcli.formats import FORMATS, get_format
from quantcli.sources.ggml_types import GGML_TYPES, REMOVED_TYPES

ALL = sorted(GGML_TYPES.keys() | REMOVED_TYPES.keys())


def test_ids_have_no_gap() -> None:
    assert list(range(len(ALL))) == ALL


@pytest.mark.parametrize("type_id", GGML_TYPES)
def test_sizes_are_ggmls(type_id: int) -> None:
    kind = GGML_TYPES[type_id]
    name, block, nbytes = ggml_reader.type_traits(type_id)
    assert (kind.name, kind.block, kind.nbytes) == (name.upper(), block, nbytes)


@pytest.mark.parametrize("type_id", REMOVED_TYPES)
def test_removed_types_have_no_size(type_id: int) -> None:
    assert ggml_reader.type_traits(type_id)[1] == 0


@pytest.mark.parametrize("name", list(FORMATS))
def test_formats_agree(name: str) -> None:
    form = get_format(name)
    assert GGML_TYPES[form.type_id] == (form.name, form.block, form.nbytes)
