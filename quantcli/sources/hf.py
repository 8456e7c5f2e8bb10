"""A Hugging Face checkpoint folder: config.json and the rows of its safetensors weights.

Rows are read where they lie, slab by slab, in the dtype they are stored in; quantized weights
come as float32, and the codes and scales they are made of do not show (`quantcli.sources.packed`).
Other tensors of integers are listed, so that one can look at them, but not read: they are no
weights. Floats of a whole tensor are never held; what is held is what the caller asked for.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.formats.integer import GridCodes
from quantcli.layouts.base import CodeGrid
from quantcli.layouts.scaled import ScaledWeight
from quantcli.layouts.stored import BlockedWeight, RowWeight
from quantcli.layouts.stored_codes import Ranges, StoredCodes
from quantcli.sources.files import WEIGHT_DTYPES, check_range, read_json
from quantcli.sources.packed import find_packed, hidden_names
from quantcli.sources.shards import Shards, open_shards
from quantcli.types import TensorInfo, row_count

CONFIG = "config.json"


class HfCheckpoint:
    """The weights of a checkpoint folder; a `quantcli.types.TensorStore`.

    ``config`` is config.json as it stands and ``folder`` where it was found.
    """

    def __init__(self, folder: Path, config: dict[str, Any], shards: Shards) -> None:
        self.folder = folder
        self.config = config
        self._shards = shards
        self._packed = find_packed(shards, config, folder / CONFIG)
        hidden = hidden_names(shards, self._packed, config, folder / CONFIG)
        parts = {part for weight in self._packed.values() for part in weight.parts}
        self._passed_over = tuple(sorted(hidden - parts))
        self._tensors = {n: info for n, info in shards.tensors.items() if n not in hidden}
        self._tensors |= {name: weight.info for name, weight in self._packed.items()}
        packed = self._packed.items()
        self._coded: dict[str, StoredCodes] = {
            name: coded
            for name, held in packed
            if isinstance(held, RowWeight | ScaledWeight) and (coded := held.coded) is not None
        }
        self._grids = {name: coded.grid for name, coded in self._coded.items()}
        self._blocks = {
            name: held.blocks for name, held in packed if isinstance(held, BlockedWeight)
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored weight by name, in no particular order."""
        return self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, by name."""
        return tuple(file.path for file in self._shards.files)

    @property
    def grids(self) -> Mapping[str, CodeGrid]:
        """The grid of each weight that is stored as codes of one, by its name."""
        return self._grids

    @property
    def passed_over(self) -> tuple[str, ...]:
        """Stored scales of activations and caches, which belong to no weight."""
        return self._passed_over

    def read_beside(self, name: str) -> NDArray[Any]:
        """One of those, as it is stored; SourceError for a dtype that is not read."""
        return self._shards.load(name)

    def leave_out(self, names: Container[str]) -> None:
        """Do as if these tensors were not stored."""
        self._tensors = {n: info for n, info in self._tensors.items() if n not in names}
        self._grids = {n: grid for n, grid in self._grids.items() if n not in names}

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start:stop``, leading axes flattened, as a new array of shape (rows, columns).

        The dtype is as stored (bfloat16 is ml_dtypes'), float32 for quantized weights.
        SourceError when the tensor's dtype is no weight's or the file ended early; IndexError
        beyond the tensor.
        """
        return self._read(name, (start, stop), None)

    def read_columns(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Columns ``start:stop`` of a matrix, transposed to shape (columns, rows).

        Of a stack's matrices they are counted through, and come of one at a time.
        """
        info = self._tensors[name]
        if len(info.shape) < 2:
            raise SourceError(
                f"{info.file}: tensor {name!r} has shape {list(info.shape)}; "
                "only a matrix can be transposed"
            )
        height, width = info.shape[-2:]
        matrix = max(0, min(start, stop - 1)) // max(1, width)
        rows = (matrix * height, (matrix + 1) * height)
        columns = (start - matrix * width, stop - matrix * width)
        return np.ascontiguousarray(self._read(name, rows, columns).T)

    def read_codes(self, name: str, start: int, stop: int) -> GridCodes:
        """Rows of a weight that is stored as codes of a grid; scales are of each row."""
        coded = self._coded[name]
        scales, zeros = self.read_ranges(name, start, stop)
        order = None if coded.order is None else coded.order(self._shards)
        return GridCodes(coded.codes(self._shards, start, stop), scales, zeros, order=order)

    def read_ranges(self, name: str, start: int, stop: int) -> Ranges:
        """The scales and zeros alone."""
        with np.errstate(all="ignore"):
            return self._coded[name].ranges(self._shards, start, stop)

    def read_whole(self, name: str) -> tuple[float | None, bool]:
        """The scale of a whole weight as it is stored, and whether it multiplies the others."""
        coded = self._coded[name]
        if coded.whole is None:
            return coded.grid.whole, False
        with np.errstate(all="ignore"):
            return coded.whole(self._shards), coded.multiplies

    @property
    def blocks(self) -> Mapping[str, str]:
        """The block format of each stack that is stored in GGUF's blocks, by its name."""
        return self._blocks

    def read_blocks(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Packed rows of columns of such a stack, counted through its matrices."""
        held = self._packed[name]
        if not isinstance(held, BlockedWeight):
            raise TypeError(f"{name} is not stored in blocks")
        return held.read_blocks(self._shards, start, stop)

    def check_unchanged(self) -> None:
        """SourceError where a file elsewhere is no longer the one that was opened."""
        self._shards.check_unchanged()

    def close(self) -> None:
        """Release the files."""
        self._shards.close()

    def _read(
        self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None
    ) -> NDArray[Any]:
        info, width = self._tensors[name], _width(self._tensors[name])
        check_range(name, rows, row_count(info.shape))
        check_range(name, columns or (0, width), width)
        if name in self._packed:
            # A scale that is no number gives weights that are none, which whoever asked refuses.
            with np.errstate(all="ignore"):
                return self._packed[name].read(self._shards, rows, columns or (0, width))
        if info.dtype not in WEIGHT_DTYPES:
            raise SourceError(
                f"{info.file}: tensor {name!r} has dtype {info.dtype}, which is no weight's; "
                f"{', '.join(WEIGHT_DTYPES)} and quantized weights with their scales are read"
            )
        place = self._shards.places[name]
        return place.file.read_block(place.offset, WEIGHT_DTYPES[info.dtype], width, rows, columns)


def _width(info: TensorInfo) -> int:
    return info.shape[-1] if info.shape else 1


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder; SourceError when it is missing or broken."""
    path = folder / CONFIG
    if folder.is_dir() and not path.exists():
        raise SourceError(
            f"{folder}: holds no {CONFIG}",
            hint="fetch it from the model's repository; it says what the weights are",
        )
    return read_json(path)


def open_checkpoint(folder: Path) -> HfCheckpoint:
    """Open the checkpoint in ``folder``: every header is read and checked, no weight is.

    SourceError when a file is missing or broken, or the weights are quantized in a way that is
    not read.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: there is no such folder")
    return hold_shards(folder, open_shards(folder))


def hold_shards(folder: Path, shards: Shards) -> HfCheckpoint:
    """The checkpoint whose settings are in ``folder``; closes ``shards`` where they do not fit."""
    try:
        return HfCheckpoint(folder, read_config(folder), shards)
    except SourceError:
        shards.close()
        raise
