"""Object stores and other filesystems by address, through fsspec: s3://, gs://, az:// and the like.

fsspec finds the package of a protocol, which finds credentials (the environment, files of settings,
the machine's own role). Every failure becomes one sentence, without credentials in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from quantcli.errors import MissingExtraError, OutputError, QuantcliError, SourceError
from quantcli.sources.patience import STATUSES

PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs",
    "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
}  # fmt: skip
"""Packages by the protocols of the usual stores."""

_OTHERS = ("hf", "http", "https", "file", "local", "")
"""What is no store: repositories and files have readers of their own, pages are not read."""
_KEYS = re.compile(r"(AWSAccessKeyId|Signature|sig|X-Amz-\w+|token)=[^&\s'\"]+", re.IGNORECASE)
_REFUSED = ("403", "401", "accessdenied", "forbidden", "unauthorized", "nocredentials")


def is_store(target: str) -> bool:
    """Whether ``target`` is an address that fsspec reads, or would with a package more."""
    scheme, separator, _ = target.partition("://")
    if not separator or scheme in _OTHERS or not re.fullmatch(r"[a-z][a-z0-9+.-]+", scheme):
        return False
    if scheme in PACKAGES:
        return True
    from fsspec.registry import available_protocols, registry

    return scheme in registry or scheme in available_protocols()


def is_local_address(target: str) -> bool:
    """Whether it is a path with ``file://`` before it."""
    return target.startswith("file://")


def local_path(target: str) -> str:
    """The path of ``file://...``."""
    return unquote(urlsplit(target).path)


def open_store(url: str, *, output: bool = False) -> tuple[Any, str]:
    """The filesystem of an address, and the path in it; MissingExtraError names its package."""
    from fsspec.core import url_to_fs

    with explaining_store(url, output=output):
        filesystem, path = url_to_fs(url)
        return filesystem, str(path).rstrip("/")


@contextmanager
def explaining_store(url: str, *, output: bool = False) -> Iterator[None]:
    """Turns whatever a store's package raises inside into a SourceError, or an OutputError."""
    try:
        yield
    except QuantcliError:
        raise
    except Exception as error:
        raise explain_store(url, error, output=output) from error


def explain_store(url: str, error: Exception, *, output: bool = False) -> QuantcliError:
    """The sentence for what a store's package raised."""
    kind = OutputError if output else SourceError
    scheme = url.partition("://")[0]
    if isinstance(error, ImportError):
        package = PACKAGES.get(scheme)
        hint = f"pip install {package}" if package else _said(error)
        return MissingExtraError(f"{url}: {scheme}:// addresses need a package", hint=hint)
    if isinstance(error, FileNotFoundError):
        return kind(f"{url}: there is no such object or bucket")
    said = _said(error)
    if isinstance(error, PermissionError) or _is_refusal(error):
        return kind(
            f"{url}: the store refuses access: {said}",
            hint=f"check the rights and credentials that {PACKAGES.get(scheme, scheme)} finds",
        )
    return kind(f"{url}: {said}")


def may_pass(error: Exception) -> bool:
    """Whether what a store's package raised may be over when it is tried again."""
    if isinstance(error, FileNotFoundError | PermissionError | ImportError | NotImplementedError):
        return False
    status = getattr(error, "status", getattr(error, "code", None))
    if isinstance(status, int) and status >= 400:
        return status in STATUSES
    return isinstance(error, OSError | TimeoutError) and not _is_refusal(error)


def _is_refusal(error: BaseException) -> bool:
    said = f"{type(error).__name__} {error}".replace(" ", "").lower()
    return any(word in said for word in _REFUSED)


def _said(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return _KEYS.sub(r"\1=...", lines[0]) if lines else type(error).__name__
