"""The extension as it was built: what it shows to the rest of the process."""

from __future__ import annotations

import subprocess

from quantcli import _native


def test_nothing_is_exported_but_the_module() -> None:
    """A kernel's name could otherwise be taken by, or from, another library of the process."""
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", _native.__file__]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["PyInit__native"]
