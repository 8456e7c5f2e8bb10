from __future__ import annotations

from collections.abc import Iterator

import pytest

from quantcli import _native
from quantcli.formats import FORMATS, BlockFormat, get_format, native


@pytest.fixture(params=list(FORMATS))
def fmt(request: pytest.FixtureRequest) -> BlockFormat:
    """Every registered block format, ready for the kernels."""
    fmt = get_format(request.param)
    native.prepare(fmt)
    return fmt


@pytest.fixture(params=_native.available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this CPU and this build offer, in use."""
    before = _native.isa()
    _native.select(request.param)
    yield request.param
    _native.select(before)
