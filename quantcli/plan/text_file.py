"""Files of text that a recipe names: chat templates, long key-values."""

from __future__ import annotations

from pathlib import Path

from quantcli.errors import UsageError

_MOST_BYTES = 16 << 20


def read_text(name: str, flag: str) -> str:
    """The text of a file; UsageError, naming ``flag``, when it cannot be read or is too long."""
    path = Path(name)
    try:
        if not path.is_file():
            raise UsageError(f"{flag}: {name} is not a file")
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{flag}: {name} is larger than {_MOST_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{flag}: {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag}: {name} is not UTF-8 at byte {error.start}") from None


def read_template(name: str) -> str:
    """A chat template; UsageError also where the file is empty."""
    found = read_text(name, "--chat-template")
    if not found.strip():
        raise UsageError(f"--chat-template: {name} is empty")
    return found
