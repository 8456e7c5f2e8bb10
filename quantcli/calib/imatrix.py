"""Calibrations as files: llama.cpp's importance matrix, and the further statistics beside it.

The importance matrix is the GGUF form that llama-imatrix writes (raw sums and true counts) or the
legacy form (.dat, means times calls). Further statistics go to ``NAME.stats.safetensors``. All of
a calibration's files appear together, or none does. Source of both forms: save_imatrix and
save_imatrix_legacy in llama.cpp's imatrix tool.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from quantcli.calib.further import STATISTICS_FORMAT, Further
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
from quantcli.writers.atomic import AtomicFiles
from quantcli.writers.gguf import TensorEntry
from quantcli.writers.gguf import lay_out as lay_out_gguf
from quantcli.writers.safetensors import lay_out as lay_out_safetensors

_I32 = Struct("<i")
_F32_ID = 0


@dataclass(frozen=True)
class Calibration:
    """An importance matrix with its facts: sums (matrices, columns) and counts (matrices,)."""

    squares: Mapping[str, NDArray[np.float64]]
    counts: Mapping[str, NDArray[np.int64]]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


def stats_path(output: Path) -> Path:
    """Where the further statistics of ``output`` lie: ``m.calib.gguf`` -> ``m.calib.stats...``."""
    stem = output.name.removesuffix(output.suffix)
    return output.with_name(f"{stem}.stats.safetensors")


def output_paths(output: Path, needs: tuple[str, ...]) -> list[Path]:
    """The files that a calibration with these statistics consists of."""
    return [output] if set(needs) <= {"mean_sq"} else [output, stats_path(output)]


def write(
    output: Path,
    calibration: Calibration,
    *,
    legacy: bool = False,
    further: Further | None = None,
    force: bool = False,
) -> list[Path]:
    """Write the importance matrix and, beside it, ``further`` statistics; returns the paths."""
    body = _pack_legacy(calibration) if legacy else _pack_gguf(calibration)
    sizes = {output: len(body)}
    beside = stats_path(output)
    layout = None
    if further is not None and further.tensors:
        facts = {
            "format": STATISTICS_FORMAT,
            "hessian_of": json.dumps(further.shares, sort_keys=True),
            "chunk_count": str(calibration.chunks),
            "chunk_size": str(calibration.chunk_size),
        }
        layout = lay_out_safetensors(facts, further.tensors)
        sizes[beside] = layout.size
    with AtomicFiles(sizes, force=force) as files:
        files.write(output, 0, body)
        if further is not None and layout is not None:
            files.write(beside, 0, layout.header)
            for name, offset, values in further.parts():
                files.write(beside, layout.offsets[name] + offset, values.data)
        files.publish()
    return list(sizes)


def _pack_gguf(calibration: Calibration) -> bytes:
    values: dict[str, NDArray[np.float32]] = {}
    for name in sorted(calibration.squares):
        values[name + SUMS] = calibration.squares[name].astype(np.float32)
        values[name + COUNTS] = calibration.counts[name].astype(np.float32)[:, None]
    metadata = {
        "general.type": text("imatrix"),
        DATASETS: array("str", list(calibration.datasets)),
        CHUNK_COUNT: u32(calibration.chunks),
        CHUNK_SIZE: u32(calibration.chunk_size),
        ENOUGH: u32(ENOUGH_TOKENS),
    }
    entries = [TensorEntry(n, value.shape, _F32_ID, value.nbytes) for n, value in values.items()]
    layout = lay_out_gguf(metadata, entries)
    whole = bytearray(layout.size)
    whole[: len(layout.header)] = layout.header
    for name, value in values.items():
        start = layout.offsets[name]
        whole[start : start + value.nbytes] = value.tobytes()
    return bytes(whole)


def _pack_legacy(calibration: Calibration) -> bytes:
    """Means times calls; this form has no counts of experts, so few tokens are made up for here."""
    names = [name for name in sorted(calibration.squares) if calibration.counts[name].any()]
    parts = [_I32.pack(len(names))]
    for name in names:
        counts = calibration.counts[name]
        means = shrink(
            calibration.squares[name].astype(np.float32),
            counts.astype(np.float32),
            ENOUGH_TOKENS,
        )
        calls = -(-int(counts.max()) // calibration.chunk_size)
        raw = name.encode()
        parts += [_I32.pack(len(raw)), raw, _I32.pack(calls), _I32.pack(means.size)]
        parts.append((means * np.float32(calls)).astype("<f4").tobytes())
    dataset = (calibration.datasets[-1] if calibration.datasets else "").encode()
    return b"".join([*parts, _I32.pack(calibration.chunks), _I32.pack(len(dataset)), dataset])
