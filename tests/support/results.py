"""What tests of families measure, for the page of models: properties of pytest's JUnit files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.gguf_models import read_config

from quantcli.archs import find_architecture

Record = Callable[[str, object], None]
"""pytest's ``record_property``."""


def record(property_of: Record, folder: Path, /, **numbers: Any) -> None:
    """Note numbers of the model in ``folder`` under GGUF's name for its architecture."""
    property_of("architecture", find_architecture(read_config(folder)).name)
    for name, value in numbers.items():
        property_of(name, float(value))


def record_error(property_of: Record, folder: Path, found: Any, expected: Any) -> float:
    """The largest difference, of the expected values' deviation; noted as "logits"."""
    error = float(abs(found - expected).max() / expected.std())
    record(property_of, folder, logits=error)
    return error
