"""What tells one model from another without reading its weights."""

from __future__ import annotations

import hashlib
import json

from quantcli.model import TRANSFORMS_KEY, Model
from quantcli.sources.address import Address
from quantcli.types import row_count

_SAMPLES = 64
"""Tensors whose first row stands for a checkpoint's weights."""


def fingerprint(model: Model) -> str:
    """SHA-256 over the configuration and the files' headers and dates, which stand for the weights.

    Of weights that are transformed as they are read the transforms count too.
    """
    whole = hashlib.sha256(json.dumps(model.config, sort_keys=True).encode())
    if TRANSFORMS_KEY in model.metadata:
        whole.update(str(model.metadata[TRANSFORMS_KEY].value).encode())
    for info in sorted(model.store.tensors.values(), key=lambda info: info.name):
        whole.update(f"{info.name}\0{info.dtype}\0{info.shape}\0".encode())
    for file in sorted({info.file for info in model.store.tensors.values()}):
        if isinstance(file, Address):
            whole.update(f"{file}\0{file.mark}\0".encode())
            continue
        found = file.stat()
        whole.update(f"{file.name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return whole.hexdigest()


def sample_model(model: Model) -> str:
    """A digest of the configuration, of all headers, and of a row of some tensors.

    Not of dates and paths, in which copies of a checkpoint on several machines differ.
    """
    whole = hashlib.sha256(json.dumps(model.config, sort_keys=True).encode())
    if TRANSFORMS_KEY in model.metadata:
        whole.update(str(model.metadata[TRANSFORMS_KEY].value).encode())
    infos = sorted(model.store.tensors.values(), key=lambda info: info.name)
    for info in infos:
        whole.update(f"{info.name}\0{info.dtype}\0{info.shape}\0".encode())
    for info in infos[:: max(1, len(infos) // _SAMPLES)]:
        if row_count(info.shape) and info.elements:
            whole.update(model.store.read_rows(info.name, 0, 1).view("u1").data)
    return whole.hexdigest()
