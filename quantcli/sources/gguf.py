"""The tensors of a GGUF file, or of all files of a split one, as a store of rows.

Float rows come as they are stored; rows of block formats, and of integers, as their raw bytes.
A model split by llama.cpp (``name-00001-of-00003.gguf``) opens as one, from whichever of its
files is named; a missing shard, one of another model or run or a tensor in two shards is refused.
Source: the ``split.*`` keys of llama.cpp's gguf-split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.formats import get_format
from quantcli.formats.container import SPLIT_ID
from quantcli.sources.files import WEIGHT_DTYPES, StoredFile, check_range
from quantcli.sources.ggml_types import GGML_TYPES
from quantcli.sources.gguf_header import GgufHeader, is_gguf, parse_gguf, read_gguf
from quantcli.types import MetaValue, TensorInfo, row_count

__all__ = ["GgufCheckpoint", "GgufHeader", "is_gguf", "open_gguf", "read_gguf", "shard_name"]

SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS = "split.count", "split.no", "split.tensors.count"
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_BLOCKS = {kind.name: kind for kind in GGML_TYPES.values()}


def shard_name(stem: str, number: int, count: int) -> str:
    """File name of shard ``number`` (from 0) of ``count``, as llama.cpp forms it."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def is_split_key(key: str) -> bool:
    """Whether a key says how a model is divided into files."""
    return key.startswith("split.") or key == SPLIT_ID


class GgufCheckpoint:
    """The tensors of a GGUF model; a `quantcli.types.TensorStore`.

    ``headers`` are those of its files in order; ``metadata`` is the first one's without the keys
    that say how it is split.
    """

    def __init__(self, files: Sequence[StoredFile], headers: Sequence[GgufHeader]) -> None:
        self.path = headers[0].path
        self.headers = tuple(headers)
        self.metadata: dict[str, MetaValue] = {
            key: value
            for key, value in headers[0].metadata.items()
            if len(headers) == 1 or not is_split_key(key)
        }
        self._files = tuple(files)
        self._tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[StoredFile, int]] = {}
        for file, header in zip(files, headers, strict=True):
            for name, info in header.tensors.items():
                if name in self._tensors:
                    raise SourceError(
                        f"{header.path}: tensor {name!r} is also in {self._tensors[name].file.name}"
                    )
                self._tensors[name] = info
                self._places[name] = (file, header.offsets[name])

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, in the order of the files."""
        return self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The GGUF files, first shard first."""
        return tuple(file.path for file in self._files)

    @property
    def file_sizes(self) -> dict[Path, int]:
        """Bytes of each of the files."""
        return {file.path: file.size for file in self._files}

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start:stop``, leading axes flattened, as a new 2-D array.

        F64, F32, F16 and BF16 come as such, (rows, columns); every other type as uint8, (rows,
        bytes per row). SourceError when the file ended early; IndexError beyond the tensor.
        """
        info = self._tensors[name]
        check_range(name, (start, stop), row_count(info.shape))
        file, offset = self._places[name]
        width = info.shape[-1] if info.shape else 1
        dtype = WEIGHT_DTYPES.get(info.dtype)
        if dtype is not None:
            return file.read_block(offset, dtype, width, (start, stop))
        kind = _BLOCKS.get(info.dtype) or get_format(info.dtype)
        row_bytes = width // kind.block * kind.nbytes
        return file.read_block(offset, np.dtype(np.uint8), row_bytes, (start, stop))

    def read_columns(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Columns ``start:stop`` of a float matrix, transposed to shape (columns, rows)."""
        info = self._tensors[name]
        dtype = WEIGHT_DTYPES.get(info.dtype)
        if dtype is None or len(info.shape) != 2:
            raise SourceError(
                f"{info.file}: tensor {name!r} is {info.dtype} of shape {list(info.shape)}; only "
                "a float matrix can be transposed"
            )
        rows, width = info.shape
        check_range(name, (start, stop), width)
        file, offset = self._places[name]
        block = file.read_block(offset, dtype, width, (0, rows), (start, stop))
        return np.ascontiguousarray(block.T)

    def check_unchanged(self) -> None:
        """SourceError where a file elsewhere is no longer the one that was opened."""
        for file in self._files:
            file.check_unchanged()

    def close(self) -> None:
        """Release the files."""
        for file in self._files:
            file.close()


def open_gguf(path: Path, open_file: Callable[[Path], StoredFile] | None = None) -> GgufCheckpoint:
    """Open a GGUF file and, when it is a shard, all the others of its model.

    ``open_file`` opens files that are not on this machine. SourceError when a file is missing or
    broken, or the shards do not belong together.
    """
    files: list[StoredFile] = []
    try:
        first = (open_file or StoredFile)(path)
        files.append(first)
        headers = [parse_gguf(first)]
        count = _split_value(headers[0], SPLIT_COUNT) or 1
        if count > 1:
            headers = _open_shards(path, count, files, open_file)
            # Not before: a place that is read over the network is left with its last file.
            files.remove(first)
            first.close()
        return GgufCheckpoint(files, headers)
    except SourceError:
        for file in files:
            file.close()
        raise


def _open_shards(
    path: Path,
    count: int,
    files: list[StoredFile],
    open_file: Callable[[Path], StoredFile] | None,
) -> list[GgufHeader]:
    """Open the shards of the model that ``path`` is one of, appending them to ``files``."""
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise SourceError(
            f"{path}: is a shard of {count}, but is not named so, so the others cannot be found",
            hint=f"give it its name back: {shard_name('NAME', 0, count)}",
        )
    headers: list[GgufHeader] = []
    for number in range(count):
        shard = path.with_name(shard_name(match["stem"], number, count))
        if open_file is None and not shard.exists():
            raise SourceError(f"{shard}: this shard of {path.name} is missing")
        files.append((open_file or StoredFile)(shard))
        header = parse_gguf(files[-1])
        found = (_split_value(header, SPLIT_NUMBER), _split_value(header, SPLIT_COUNT))
        if found != (number, count):
            raise SourceError(
                f"{shard}: says it is shard {found[0]} (from 0) of {found[1]}, but its name says "
                f"{number} of {count}"
            )
        headers.append(header)
    _refuse_mixture(headers)
    total = _split_value(headers[0], SPLIT_TENSORS)
    held = sum(len(header.tensors) for header in headers)
    if total is not None and total != held:
        raise SourceError(
            f"{headers[0].path}: promises {total} tensors in {count} shards, which hold {held}"
        )
    return headers


def _refuse_mixture(headers: Sequence[GgufHeader]) -> None:
    """SourceError where two shards of ours are of different runs."""
    ids = [header.metadata.get(SPLIT_ID) for header in headers]
    for header, found in zip(headers, ids, strict=True):
        if found != ids[0]:
            raise SourceError(
                f"{header.path}: is of another run than {headers[0].path.name}, as the key "
                f"{SPLIT_ID} tells",
                hint="a run that replaced them was stopped, or files were mixed; make them again",
            )


def _split_value(header: GgufHeader, key: str) -> int | None:
    found = header.metadata.get(key)
    if found is None:
        return None
    if found.kind not in ("u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64"):
        raise SourceError(f"{header.path}: key {key!r} is {found.value!r}, not a whole number")
    return int(found.value)
