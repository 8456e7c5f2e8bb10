"""Calibrations as files: llama.cpp's importance matrix, and further statistics in a second file.

The importance matrix is the GGUF form that llama-imatrix writes (raw sums and true counts) or the
legacy form (.dat, means times calls). Further statistics go to ``NAME.stats.safetensors``. All of a
calibration's files appear together, or none does. Source of both forms: save_imatrix and
save_imatrix_legacy in llama.cpp's imatrix tool.
"""

from __future__ import annotations

import json
from pathlib import Path

from quantcli.artifacts.atomic import AtomicFiles
from quantcli.artifacts.imatrix_container import Calibration, pack_gguf, pack_legacy
from quantcli.artifacts.safetensors_container import lay_out as lay_out_safetensors
from quantcli.statistics.statistics_file import STATISTICS_FORMAT, StatisticsSource

__all__ = ["Calibration", "output_paths", "stats_path", "write"]


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
    further: StatisticsSource | None = None,
    force: bool = False,
) -> list[Path]:
    """Write the importance matrix and ``further`` statistics; returns the paths."""
    body = pack_legacy(calibration) if legacy else pack_gguf(calibration)
    sizes = {output: len(body)}
    second = stats_path(output)
    layout = None
    if further is not None and further.tensors:
        facts = {
            "format": STATISTICS_FORMAT,
            "hessian_of": json.dumps(further.shares, sort_keys=True),
            "chunk_count": str(calibration.chunks),
            "chunk_size": str(calibration.chunk_size),
        }
        layout = lay_out_safetensors(facts, further.tensors)
        sizes[second] = layout.size
    with AtomicFiles(sizes, force=force) as files:
        files.write(output, 0, body)
        if further is not None and layout is not None:
            files.write(second, 0, layout.header)
            for name, offset, values in further.parts():
                files.write(second, layout.offsets[name] + offset, values.data)
        files.publish()
    return list(sizes)
