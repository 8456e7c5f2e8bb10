"""The kinds of output: a GGUF file, or a model folder, by the recipe's ``to``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from quantcli.artifacts import gguf_file, model_folder
from quantcli.artifacts.folder_job import (
    FolderJob,
    default_folder,
    folder_threads,
    prepare_folder,
)
from quantcli.artifacts.gguf_file import Job
from quantcli.model import Model
from quantcli.plan.recipe import Recipe
from quantcli.plan.schemes import knows_importance
from quantcli.rounding.run_store import EncodedStore
from quantcli.sources.imatrix import Importance
from quantcli.types import Event

Artifact = Job | FolderJob


def default_path(model: Model, recipe: Recipe) -> Path:
    """A name made of the model's and the recipe's, in the current folder."""
    name = gguf_file.default_output if recipe.to == "gguf" else default_folder
    return name(model, recipe)


def plan_output(
    model: Model, recipe: Recipe, path: Path, importance: Importance | None = None, *,
    force: bool = False, check: bool = True,
) -> Artifact:  # fmt: skip
    """Decide everything about ``path`` without reading a weight.

    ``importance`` is left out where the recipe says that ranges are found without. ``check=False``
    leaves out the checks on the output's place.
    """
    if recipe.to == "gguf":
        return gguf_file.prepare(
            model, recipe, path, importance=importance, force=force, check=check
        )
    known = importance if knows_importance(recipe) else None
    return prepare_folder(model, recipe, path, importance=known, force=force, check=check)


def count_threads(artifact: Artifact, threads: int | None, max_memory: int | None) -> int:
    """How many threads may write within ``max_memory`` bytes; PlanError when not even one."""
    if isinstance(artifact, Job):
        return gguf_file.threads_within(artifact, threads, max_memory)
    return folder_threads(artifact, threads, max_memory)


def write_output(artifact: Artifact, encoded: EncodedStore | None, threads: int) -> Iterator[Event]:
    """Yields progress, at last `Finished`; tensors in ``encoded`` are taken from there."""
    if isinstance(artifact, Job):
        return gguf_file.execute(artifact, threads=threads, encoded=encoded)
    source = None
    if encoded is not None:
        from quantcli.run.folder_codes import stored_codes

        source = stored_codes(artifact, encoded)
    return model_folder.execute_folder(artifact, threads=threads, source=source)


def source_bytes(artifact: Artifact) -> int:
    """Bytes of the source that are read for it."""
    if isinstance(artifact, Job):
        return sum(artifact.model.stored_bytes(item.tensor) for item in artifact.plan.items)
    return sum(info.nbytes for info in artifact.model.store.tensors.values())
