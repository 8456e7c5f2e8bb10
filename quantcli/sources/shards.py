"""The safetensors files of a checkpoint folder, checked against their index.

A checkpoint is one ``model.safetensors``, or several shards with ``model.safetensors.index.json``
that says which tensor is in which shard. The index and the shards must agree on every tensor, both
ways; a checkpoint from which a shard is missing, or which is a mixture of two downloads, is found
here and not as a strange model later. Shards without an index are refused, since nothing says
whether they are all there. Source: the layout that transformers' ``save_pretrained`` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantcli.errors import SourceError
from quantcli.sources.files import StoredFile, read_json
from quantcli.sources.safetensors import SafetensorsHeader, parse_header
from quantcli.types import TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": np.uint8, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I8": np.int8, "U8": np.uint8, "I32": np.int32, "U32": np.uint32, "I64": np.int64,
}  # fmt: skip
"""NumPy's types for what codes and scales are stored in; E4M3 codes are looked up as bytes."""

_INSTEAD: tuple[tuple[str, str, str], ...] = (
    (
        "model-*-of-*.safetensors",
        f"holds shards but no {INDEX}, so nothing says whether they are all there",
        f"fetch {INDEX} from the same place",
    ),
    (
        "*.bin",
        "holds only PyTorch weights ({found}), which are programs as much as data and are not read",
        'convert them once: python -c "import transformers as t; '
        "t.AutoModelForCausalLM.from_pretrained('{folder}', dtype='auto')"
        ".save_pretrained('{folder}')\"",
    ),
    (
        "adapter_model.safetensors",
        "holds an adapter, not a whole model",
        "merge it into its base model first (peft: merge_and_unload, save_pretrained)",
    ),
    (
        "consolidated*.safetensors",
        "holds the weights in Mistral's own layout ({found})",
        "take the files named model*.safetensors of the same repository",
    ),
    ("*.gguf", "holds GGUF files, not a checkpoint", "name the file itself: {found}"),
    ("*.safetensors", f"holds {{found}} but no {SINGLE} and no {INDEX}", "rename or index it"),
)
"""Glob of files found in place of a checkpoint, what is said of them, and the next step."""


_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def adapter_notes(folder: Path) -> tuple[str, ...]:
    """A remark on an adapter that lies beside a whole model, and is no part of it."""
    found = next((name for name in _ADAPTERS if (folder / name).is_file()), None)
    if found is None:
        return ()
    return (
        f"{folder / found} is an adapter, which is left out; if it is not yet merged into the "
        "weights beside it, do that first (peft: merge_and_unload, save_pretrained)",
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes are."""

    file: StoredFile
    offset: int


@dataclass(frozen=True, slots=True)
class Shards:
    """The open files of a checkpoint, and what they hold."""

    files: tuple[StoredFile, ...]
    tensors: dict[str, TensorInfo]
    places: dict[str, Place]

    def load(
        self,
        name: str,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
        *,
        width: int | None = None,
    ) -> NDArray[Any]:
        """Part of a tensor as a matrix of its own dtype, leading axes flattened.

        ``width`` is a row's length where that is not the last axis. E4M3 comes as bytes.
        """
        info, place = self.tensors[name], self.places[name]
        width = width or (info.shape[-1] if info.shape else 1)
        span = rows or (0, info.elements // max(1, width))
        if info.dtype not in _DTYPES:
            raise SourceError(
                f"{info.file}: tensor {name!r} has dtype {info.dtype}, whose values are not read"
            )
        dtype = np.dtype(_DTYPES[info.dtype])
        return place.file.read_block(place.offset, dtype, width, span, columns)

    def load_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes ``start:stop`` of a tensor, whatever its dtype."""
        place, data = self.places[name], np.empty(stop - start, np.uint8)
        place.file.fill(data, place.offset + start)
        return data

    def is_remote(self, name: str) -> bool:
        """Whether a read costs a request."""
        return self.places[name].file.is_remote

    def check_unchanged(self) -> None:
        """SourceError where a file elsewhere is no longer the one that was opened."""
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        """Release the files."""
        _close_all(self.files)


def open_shards(folder: Path, open_file: Callable[[Path], StoredFile] | None = None) -> Shards:
    """Open every safetensors file of the checkpoint and check them against the index.

    ``open_file`` opens shards that are not in the folder. SourceError names the first thing that
    is wrong; then nothing stays open.
    """
    weight_map = read_index(folder, is_local=open_file is None)
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    opened: list[StoredFile] = []
    try:
        headers: dict[str, SafetensorsHeader] = {}
        for name in names:
            opened.append((open_file or StoredFile)(folder / name))
            headers[name] = parse_header(opened[-1])
        if weight_map is not None:
            _check_index(weight_map, headers, folder)
    except SourceError:
        _close_all(opened)
        raise
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Place] = {}
    for file, header in zip(opened, headers.values(), strict=True):
        tensors |= header.tensors
        places |= {name: Place(file, offset) for name, offset in header.offsets.items()}
    return Shards(tuple(opened), tensors, places)


def _close_all(files: Iterable[StoredFile]) -> None:
    for file in files:
        file.close()


def read_index(folder: Path, *, is_local: bool = True) -> dict[str, str] | None:
    """Tensor name -> shard file name, or None when the checkpoint is the single file.

    SourceError when the index is broken or, where the weights are local, names what is not there.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: there is no such folder")
    path, single = folder / INDEX, folder / SINGLE
    if not path.exists():
        if is_local and not single.exists():
            raise _no_weights(folder)
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: has no 'weight_map' of tensors")
    good: set[str] = set()
    for tensor, shard in weight_map.items():
        if isinstance(shard, str) and shard in good:
            continue
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise SourceError(f"{path}: tensor {tensor!r} is in {shard!r}, not a safetensors file")
        if Path(shard).name != shard:
            raise SourceError(f"{path}: tensor {tensor!r} is in {shard!r}, outside of the folder")
        good.add(shard)
    if single.exists() and SINGLE not in weight_map.values():
        raise SourceError(
            f"{folder}: holds both {SINGLE} and an index that does not name it",
            hint="remove the one that does not belong to the model",
        )
    for shard in sorted(set(weight_map.values())):
        if is_local and not (folder / shard).exists():
            lost = sum(1 for where in weight_map.values() if where == shard)
            raise SourceError(
                f"{path}: names the shard {shard}, which is not there ({lost} tensors)",
                hint="the download is incomplete",
            )
    return weight_map


def _check_index(
    weight_map: dict[str, str], headers: dict[str, SafetensorsHeader], folder: Path
) -> None:
    index = folder / INDEX
    held: dict[str, str] = {}
    for shard, header in headers.items():
        for tensor in header.tensors:
            if tensor in held:
                raise SourceError(
                    f"{folder}: tensor {tensor!r} is in two shards, {held[tensor]} and {shard}"
                )
            held[tensor] = shard
    for tensor, shard in weight_map.items():
        actual = held.get(tensor)
        if actual is None:
            raise SourceError(f"{index}: says that {shard} holds tensor {tensor!r}; no shard does")
        if actual != shard:
            raise SourceError(
                f"{index}: says that {shard} holds tensor {tensor!r}, but {actual} does"
            )
    for tensor, shard in held.items():
        if tensor not in weight_map:
            raise SourceError(
                f"{index}: does not name tensor {tensor!r}, which {shard} holds",
                hint="the index belongs to other shards",
            )


def _no_weights(folder: Path) -> SourceError:
    for pattern, message, hint in _INSTEAD:
        found = sorted(path.name for path in folder.glob(pattern))
        if found:
            listed = found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"
            return SourceError(
                f"{folder}: {message.format(found=listed, folder=folder)}",
                hint=hint.format(found=folder / found[0], folder=folder),
            )
    return SourceError(
        f"{folder}: holds no {SINGLE} and no {INDEX}",
        hint="name the folder with config.json and the weights, a .gguf file, or org/name",
    )
