"""Whether what runs models is installed; asked before anything is imported that needs it."""

from __future__ import annotations

from importlib.util import find_spec

from quantcli.errors import MissingExtraError

_NEEDED = ("torch", "transformers")


def require_torch() -> None:
    """MissingExtraError with the install command where torch or transformers is not installed."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"running a model needs {' and '.join(missing)}",
            hint="pip install torch transformers",
        )
