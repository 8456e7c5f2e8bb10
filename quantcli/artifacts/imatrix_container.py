"""Importance matrices in llama.cpp's two forms: GGUF (raw sums, true counts), legacy (.dat, means).

Source of both forms: save_imatrix and save_imatrix_legacy in llama.cpp's imatrix tool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct, error

import numpy as np
from numpy.typing import NDArray

from quantcli.artifacts.gguf_container import TensorEntry, lay_out
from quantcli.errors import SourceError
from quantcli.sources.imatrix import (
    CHUNK_COUNT,
    CHUNK_SIZE,
    COUNTS,
    DATASETS,
    ENOUGH,
    ENOUGH_TOKENS,
    SUMS,
    shrink,
)
from quantcli.types import array, text, u32

_I32 = Struct("<i")
_F32_ID = 0
_LONGEST_NAME = 1 << 12


@dataclass(frozen=True)
class Calibration:
    """An importance matrix with its facts: sums (matrices, columns) and counts (matrices,).

    ``enough`` tokens on an expert let its own mean stand; 0 takes every mean as it is.
    """

    squares: Mapping[str, NDArray[np.float64]]
    counts: Mapping[str, NDArray[np.int64]]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int
    enough: int = ENOUGH_TOKENS


def pack_gguf(calibration: Calibration) -> bytes:
    """The GGUF form of ``calibration``."""
    values: dict[str, NDArray[np.float32]] = {}
    for name in sorted(calibration.squares):
        values[name + SUMS] = calibration.squares[name].astype(np.float32)
        values[name + COUNTS] = calibration.counts[name].astype(np.float32)[:, None]
    metadata = {
        "general.type": text("imatrix"),
        DATASETS: array("str", list(calibration.datasets)),
        CHUNK_COUNT: u32(calibration.chunks),
        CHUNK_SIZE: u32(calibration.chunk_size),
    }
    if calibration.enough:
        metadata[ENOUGH] = u32(calibration.enough)
    entries = [TensorEntry(n, value.shape, _F32_ID, value.nbytes) for n, value in values.items()]
    # Suffixes come behind names that a model itself may have; who reads these has no such limit.
    layout = lay_out(metadata, entries, longest_name=_LONGEST_NAME)
    whole = bytearray(layout.size)
    whole[: len(layout.header)] = layout.header
    for name, value in values.items():
        start = layout.offsets[name]
        whole[start : start + value.nbytes] = value.tobytes()
    return bytes(whole)


def pack_legacy(calibration: Calibration) -> bytes:
    """Means times calls; this form has no counts of experts, so few tokens are made up for here."""
    names = [name for name in sorted(calibration.squares) if calibration.counts[name].any()]
    parts = [_I32.pack(len(names))]
    for name in names:
        counts = calibration.counts[name]
        means = shrink(
            calibration.squares[name].astype(np.float32),
            counts.astype(np.float32),
            calibration.enough,
        )
        calls = -(-int(counts.max()) // calibration.chunk_size)
        raw = name.encode()
        parts += [_I32.pack(len(raw)), raw, _pack_count(calls, f"calls of {name}")]
        parts.append(_pack_count(means.size, f"values of {name}"))
        parts.append((means * np.float32(calls)).astype("<f4").tobytes())
    dataset = (calibration.datasets[-1] if calibration.datasets else "").encode()
    chunks = _pack_count(calibration.chunks, "chunks")
    return b"".join([*parts, chunks, _I32.pack(len(dataset)), dataset])


def _pack_count(number: int, what: str) -> bytes:
    """A number as this form has it; SourceError where it is beyond that."""
    try:
        return _I32.pack(number)
    except error as beyond:
        raise SourceError(
            f"the number of {what} is {number}, which the legacy form cannot hold",
            hint="keep the GGUF form",
        ) from beyond
