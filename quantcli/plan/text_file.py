"""Files of text that a recipe names: chat templates, long key-values."""

from __future__ import annotations

from pathlib import Path

from quantcli.errors import UsageError
from quantcli.whole_files import read_whole_text

_MOST_BYTES = 16 << 20


def read_text(name: str, flag: str) -> str:
    """The text of a file; UsageError, naming ``flag``, when it cannot be read or is too long."""
    path = Path(name)
    try:
        if not path.is_file():
            raise UsageError(f"{flag}: {name} is not a file")
        return read_whole_text(path, _MOST_BYTES)
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
