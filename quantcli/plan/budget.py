"""What a plan costs before it runs: memory and disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.errors import OutputError
from quantcli.formats import FORMATS, get_format
from quantcli.pieces import GATHER_SPREAD

if TYPE_CHECKING:
    from quantcli.plan.planner import Plan, TensorPlan

BASE_BYTES = 160 << 20
"""The interpreter with its libraries, a vocabulary of 256 thousand tokens and the file's header."""

_BYTES_OF = {"F64": 8, "F8_E4M3": 1, "F8_E5M2": 1}


def thread_memory(plan: Plan, slab_bytes: int) -> int:
    """Bytes that a thread holds at most while it encodes a plan's tensors, as an estimate.

    One slab of ``slab_bytes`` as stored (at least one row), the span that it was gathered from (a
    whole matrix where it is transposed), a float32 copy where the stored dtype is not a float that
    the kernels read, one float32 row, and the encoded slab.
    """
    return max((_slab_cost(item, slab_bytes) for item in plan.items), default=0)


def _slab_cost(item: TensorPlan, slab_bytes: int) -> int:
    tensor = item.tensor
    columns = max(1, tensor.columns)
    dtype = tensor.dtype
    if dtype in FORMATS and get_format(dtype).fits(columns):
        row = get_format(dtype).row_bytes(columns)
    else:
        row = _BYTES_OF.get(dtype, 4) * columns
    rows = min(max(1, slab_bytes // row), max(1, tensor.rows))
    apart = [p.group[0] for p in tensor.pieces if not p.keeps_rows and not p.transposes]
    rows = max(rows, *apart, 0)
    moved = bool(apart) or any(p.order and p.keeps_rows for p in tensor.pieces)
    shifted = any(piece.pointwise for piece in tensor.pieces)
    plain = dtype in ("F64", "F32", "F16", "BF16") and not shifted
    stored = rows * row * (GATHER_SPREAD + 1 if moved else 1)
    floats = 4 * columns * (1 if plain else rows + 1)
    encoded = rows * get_format(item.format).row_bytes(columns)
    return stored + floats + encoded


def free_disk(path: str | Path) -> int:
    """Bytes free for this user where ``path`` is, or where its nearest existing parent is."""
    return shutil.disk_usage(existing_place(path)).free


def existing_place(path: str | Path) -> Path:
    """The folder, or its nearest parent that exists."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return place


def check_disk(needed: int, path: str | Path) -> None:
    """OutputError unless ``needed`` bytes are free at ``path``."""
    free = free_disk(path)
    if needed > free:
        raise OutputError(
            f"not enough disk at {path}: {needed:,} bytes needed, {free:,} bytes free",
            hint="free some space, choose another folder with -o or a smaller type",
        )
