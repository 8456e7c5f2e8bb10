"""A Hugging Face checkpoint folder: config.json and the rows of its safetensors weights.

Rows are read where they lie, slab by slab, in the dtype they are stored in; FP8 comes as float32
with its scales multiplied in, and the scale tensors do not show. Tensors of other dtypes
(integers, packed 4-bit codes) are listed, so that one can look at them, but not read: they are
no weights. Floats of a whole tensor are never held; what is held is what the caller asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.sources import fp8
from quantcli.sources.files import WEIGHT_DTYPES, check_range, read_json
from quantcli.sources.shards import Shards, open_shards
from quantcli.types import TensorInfo, row_count

CONFIG = "config.json"

_STORED = WEIGHT_DTYPES | {
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


class HfCheckpoint:
    """The weights of a checkpoint folder; a `quantcli.types.TensorStore`.

    ``config`` is config.json as it stands and ``folder`` where it was found.
    """

    def __init__(self, folder: Path, config: dict[str, Any], shards: Shards) -> None:
        self.folder = folder
        self.config = config
        self._shards = shards
        self._scales = fp8.pair_scales(shards.tensors, fp8.block_size(config, folder / CONFIG))
        hidden = fp8.hidden_names(shards.tensors, self._scales)
        self._tensors = {n: info for n, info in shards.tensors.items() if n not in hidden}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored weight by name, in no particular order."""
        return self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, by name."""
        return tuple(file.path for file in self._shards.files)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start:stop``, leading axes flattened, as a new array of shape (rows, columns).

        The dtype is as stored (bfloat16 is ml_dtypes'), float32 for FP8. SourceError when the
        tensor's dtype is no weight's or the file ended early; IndexError beyond the tensor.
        """
        return self._read(name, (start, stop), None)

    def read_columns(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Columns ``start:stop`` of a matrix, transposed to shape (columns, rows)."""
        info = self._tensors[name]
        if len(info.shape) != 2:
            raise SourceError(
                f"{info.file}: tensor {name!r} has shape {list(info.shape)}; "
                "only a matrix can be transposed"
            )
        return np.ascontiguousarray(self._read(name, (0, info.shape[0]), (start, stop)).T)

    def close(self) -> None:
        """Release the files."""
        self._shards.close()

    def _read(
        self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None
    ) -> NDArray[Any]:
        info = self._tensors[name]
        if info.dtype not in WEIGHT_DTYPES and name not in self._scales:
            raise SourceError(
                f"{info.file}: tensor {name!r} has dtype {info.dtype}, which is no weight's; "
                f"{', '.join(WEIGHT_DTYPES)} and {fp8.DTYPE} are read"
            )
        block = self._block(name, rows, columns)
        scale = self._scales.get(name)
        if scale is None:
            return block
        first, last = columns or (0, _width(info))
        return self._apply(scale, block, info, rows, (first, last))

    def _apply(
        self,
        scale: fp8.Scale,
        codes: NDArray[Any],
        info: TensorInfo,
        rows: tuple[int, int],
        columns: tuple[int, int],
    ) -> NDArray[np.float32]:
        if codes.size == 0:
            return np.empty(codes.shape, dtype=np.float32)
        matrix_rows = info.shape[-2] if len(info.shape) > 1 else 1
        numbers = scale.row_numbers(*rows, matrix_rows)
        place, stored = self._shards.places[scale.name], self._shards.tensors[scale.name]
        width = scale.block_columns
        grid = place.file.read_block(
            place.offset,
            _STORED[stored.dtype],
            scale.grid_columns,
            (int(numbers[0]), int(numbers[-1]) + 1),
            (columns[0] // width, -(-columns[1] // width)),
        )
        factors = grid.astype(np.float32)[numbers - numbers[0]]
        return fp8.decode(codes, factors, columns[0], width)

    def _block(
        self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None
    ) -> NDArray[Any]:
        info, place = self._tensors[name], self._shards.places[name]
        check_range(name, rows, row_count(info.shape))
        if columns is not None:
            check_range(name, columns, _width(info))
        return place.file.read_block(place.offset, _STORED[info.dtype], _width(info), rows, columns)


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
    not FP8.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: there is no such folder")
    shards = open_shards(folder)
    try:
        return HfCheckpoint(folder, read_config(folder), shards)
    except SourceError:
        shards.close()
        raise
