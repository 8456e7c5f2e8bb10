"""A model folder before a weight is read: its plan, every byte offset and every file beside.

`prepare_folder` decides and checks all; `quantcli.artifacts.model_folder` then fills the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantcli import __version__
from quantcli.artifacts.atomic_folder import MANIFEST, refuse_folder
from quantcli.artifacts.folder_card import write_card
from quantcli.artifacts.folder_settings import (
    CONFIG,
    INDEX,
    read_settings,
    shard_names,
    write_index,
)
from quantcli.artifacts.gguf_container import Layout
from quantcli.artifacts.gguf_file import SLAB_BYTES, default_threads
from quantcli.artifacts.safetensors_container import lay_out
from quantcli.errors import PlanError
from quantcli.layouts import find_layout
from quantcli.layouts.base import ROWS, Packing, Subject
from quantcli.model import TRANSFORMS_KEY, Model
from quantcli.plan.budget import BASE_BYTES, check_disk
from quantcli.plan.folders import Copy, FolderPlan, Item, make_folder_plan
from quantcli.plan.linear_layers import natural
from quantcli.plan.recipe import Recipe
from quantcli.plan.recipe_file import dump_recipe
from quantcli.plan.schemes import DTYPES, has_types
from quantcli.plan.size_text import parse_size
from quantcli.sources.imatrix import Importance
from quantcli.types import Declared

DEFAULT_SHARD = "5G"
_NO_DIGEST = "sha256:" + "0" * 64
_WORKING_BYTES = 24 << 20
"""What a thread holds for one slab beyond its rows as stored: floats, codes, and a chunk's
temporaries."""


@dataclass(frozen=True)
class FolderJob:
    """A decided model folder: everything but the weights has been read and checked.

    ``layouts`` are the safetensors files by name, ``tensors`` what they declare and where, and
    ``settings`` the other files; ``files`` are those of them that a caller gave.
    """

    model: Model
    plan: FolderPlan
    importance: Importance | None
    packing: Packing | None
    path: Path
    layouts: Mapping[str, Layout]
    tensors: Mapping[str, tuple[str, int, Declared]]
    settings: Mapping[str, bytes]
    force: bool
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Exact size of all files together."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        weights = {name: layout.size for name, layout in self.layouts.items()}
        return weights | {name: len(body) for name, body in self.settings.items()}

    @property
    def bits_per_weight(self) -> float:
        """Over all tensors, scales and zero points included."""
        stored = sum(declared.nbytes for _, _, declared in self.tensors.values())
        return 8 * stored / max(1, self.plan.elements)

    def nbytes_of(self, item: Item | Copy) -> int:
        """Bytes that a matrix or a copied tensor takes in the output."""
        if isinstance(item, Copy):
            return item.rows * item.columns * (4 if item.dtype == "F32" else 2)
        scheme = self.plan.scheme
        if scheme is None or self.packing is None:
            return item.matrix.elements * (4 if item.dtype == "F32" else 2)
        declared = self.packing.declare(item.matrix, scheme.grid)
        return sum(tensor.nbytes for tensor in declared) // max(1, item.matrix.stack)


def default_folder(model: Model, recipe: Recipe) -> Path:
    """``NAME-TO-...`` in the current folder, NAME being the repository's or the folder's."""
    name = model.repo.rpartition("/")[2] if model.repo else model.path.resolve().name
    if has_types(recipe.to):
        return Path(f"{name}-hf-{recipe.type}")
    if recipe.activations:
        return Path(f"{name}-{recipe.to}-w8a8")
    return Path(f"{name}-{recipe.to}-{recipe.bits or 4}bit")


def prepare_folder(
    model: Model,
    recipe: Recipe,
    output: Path,
    *,
    importance: Importance | None = None,
    plan: FolderPlan | None = None,
    packing: Packing | None = None,
    files: Mapping[str, bytes] | None = None,
    force: bool = False,
    check: bool = True,
) -> FolderJob:
    """Decide everything about making ``output`` of ``model`` without reading a weight.

    ``check=False`` leaves out the checks on the output's place (for a dry run). A ``plan`` that
    was made already is taken as it is, and so is a ``packing``; ``files`` stand beside the weights
    in place of those of the same name. Raises PlanError, OutputError or UsageError before any
    work is done.
    """
    shapes = None
    if importance is not None:
        shapes = {name: values.shape for name, values in importance.entries.items()}
    plan = plan or make_folder_plan(model, recipe, importance=shapes)
    files = files or {}
    packing = packing or _choose_packing(model, plan)
    declared = _declare(plan, packing, model)
    shards = _split(declared, parse_size(recipe.split_max_size or DEFAULT_SHARD))
    names = shard_names(len(shards))
    header = {"format": find_layout(recipe.to).header}
    layouts = {name: lay_out(header, shard) for name, shard in zip(names, shards, strict=True)}
    tensors = {
        tensor.name: (name, layouts[name].offsets[tensor.name], tensor)
        for name, shard in zip(names, shards, strict=True)
        for tensor in shard
    }
    job = FolderJob(
        model, plan, importance, packing, output, layouts, tensors,
        {**make_settings(model, plan, packing, tensors, _NO_DIGEST), **files}, force, files,
    )  # fmt: skip
    if check:
        _refuse_source(model, output)
        refuse_folder(output, force=force)
        check_disk(job.nbytes, output.absolute().parent)
    return job


def folder_threads(job: FolderJob, threads: int | None, max_memory: int | None) -> int:
    """How many threads may work within ``max_memory`` bytes; PlanError when not even one."""
    wanted = threads or default_threads()
    if max_memory is None:
        return wanted
    fit = (max_memory - BASE_BYTES) // _thread_bytes(job)
    if fit < 1:
        needed = folder_memory(job, 1)
        raise PlanError(
            f"{job.model.label} needs up to {needed:,} bytes of memory even on one thread, "
            f"more than the {max_memory:,} allowed",
            hint=f"--max-memory {-(-needed // 10**6)}M is enough",
        )
    return min(wanted, fit)


def folder_memory(job: FolderJob, threads: int) -> int:
    """Bytes of resident memory that the run needs at most, as an estimate."""
    return BASE_BYTES + threads * _thread_bytes(job)


def _choose_packing(model: Model, plan: FolderPlan) -> Packing | None:
    scheme = plan.scheme
    if scheme is None:
        return None
    packing = scheme.packing
    for item in plan.items:
        reason = packing.refuse(item.matrix, scheme.grid)
        if reason is not None:
            matrix, info = item.matrix, model.store.tensors[item.matrix.source]
            raise PlanError(
                f"{info.file}: {info.name} ({matrix.rows} x {matrix.columns}) does not fit "
                f"--to {scheme.layout.name}: {reason}",
                hint=f"--keep '{matrix.module}' leaves it as it is",
            )
    return packing


def _declare(plan: FolderPlan, packing: Packing | None, model: Model) -> list[Declared]:
    declared = [
        Declared(copy.name, copy.dtype, copy.shape) for copy in plan.copies if copy.row == 0
    ]
    if packing is not None and plan.scheme is not None:
        for item in plan.items:
            if item.matrix.slot == 0:
                declared += packing.declare(item.matrix, plan.scheme.grid)
    else:
        sources = {item.matrix.source: item.dtype for item in plan.items}
        declared += [
            Declared(name, dtype, model.store.tensors[name].shape)
            for name, dtype in sources.items()
        ]
    return sorted(declared, key=lambda tensor: natural(tensor.name))


def _split(tensors: Sequence[Declared], limit: int) -> list[list[Declared]]:
    """Shards of at most ``limit`` bytes; a tensor that is larger gets one of its own."""
    shards: list[list[Declared]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def make_settings(
    model: Model,
    plan: FolderPlan,
    packing: Packing | None,
    tensors: Mapping[str, tuple[str, int, Declared]],
    digest: str,
) -> dict[str, bytes]:
    """Every file but the weights, by name; their sizes do not depend on the digest."""
    files = read_settings(model.path)
    recipe = plan.recipe
    if recipe.imatrix:
        recipe = replace(recipe, imatrix=Path(recipe.imatrix).name)
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    if plan.recipe.dtype is not None or plan.scheme is None:
        config = _with_dtype(config, DTYPES[plan.dtype])
    if packing is not None and plan.scheme is not None:
        quantized = [item.matrix.module for item in plan.items]
        config |= packing.describe(Subject(config, plan.scheme.grid, quantized, plan.kept))
    files[CONFIG] = _json(config)
    places = {name: shard for name, (shard, _, _) in tensors.items()}
    if len(set(places.values())) > 1:
        total = sum(declared.nbytes for _, _, declared in tensors.values())
        files[INDEX] = write_index(places, total)
    source = {"repo": model.repo, "revision": model.revision, "digest": digest}
    text = dump_recipe(recipe)
    manifest: dict[str, Any] = {
        "schema": "quantcli.manifest/1",
        "quantcli": __version__,
        "to": recipe.to,
        "recipe": text,
        "source": {key: value for key, value in source.items() if value is not None},
    }
    if TRANSFORMS_KEY in model.metadata:
        manifest["transforms"] = json.loads(str(model.metadata[TRANSFORMS_KEY].value))
    files[MANIFEST] = _json(manifest)
    stored = sum(declared.nbytes for _, _, declared in tensors.values())
    files["README.md"] = write_card(
        model.path,
        name=model.repo or model.path.resolve().name,
        repo=model.repo,
        to=recipe.to,
        weights=plan.label,
        recipe=text,
        nbytes=stored,
        bits=8 * stored / max(1, plan.elements),
        version=__version__,
    )
    return dict(sorted(files.items()))


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration, and those inside of it, for weights of another dtype."""
    changed = dict(config)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            changed[key] = dtype
        elif key.endswith("_config") and isinstance(value, Mapping):
            changed[key] = _with_dtype(value, dtype)
    return changed


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _refuse_source(model: Model, output: Path) -> None:
    """The output replaces nothing that it is made from."""
    source, target = model.path.resolve(), output.resolve()
    if target == source or target in source.parents:
        raise PlanError(f"{output} holds the model itself", hint="choose another name with -o")


def _thread_bytes(job: FolderJob) -> int:
    """Rows as stored and what is made of them; 32 rows at least, however long they are."""
    longest = max((item.columns for item in job.plan.items), default=0)
    return 4 * max(SLAB_BYTES, 4 * ROWS * longest) + _WORKING_BYTES
