"""What ``quantcli.quantize`` calls: one function for files and for model folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from quantcli import pipeline
from quantcli.folder_job import default_folder, prepare_folder
from quantcli.folders import execute_folder
from quantcli.model import open_model
from quantcli.pipeline import Finished
from quantcli.plan.recipe import Recipe, check_recipe, merge_recipe
from quantcli.sources.imatrix import read_importance


def quantize(
    source: str | Path,
    output: str | Path | None = None,
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    force: bool = False,
    **recipe: Any,
) -> Finished:
    """Quantize a model in one call; ``recipe`` takes the fields of `Recipe`, such as ``type``.

    ``to`` makes a model folder in place of a GGUF. ``output`` defaults to a name made of the
    model's and the recipe's in the current folder. Raises a QuantcliError in one sentence for
    whatever is wrong, and then leaves nothing behind.
    """
    wanted = merge_recipe(Recipe(), **recipe)
    check_recipe(wanted)
    if wanted.to == "gguf":
        return pipeline.quantize(
            source, output, threads=threads, max_memory=max_memory, force=force, **recipe
        )
    importance = read_importance(Path(wanted.imatrix)) if wanted.imatrix else None
    with open_model(source, vocabulary=False) as model:
        path = Path(output) if output is not None else default_folder(model, wanted)
        job = prepare_folder(model, wanted, path, importance=importance, force=force)
        *_, finished = execute_folder(job, threads=threads, max_memory=max_memory)
    return cast(Finished, finished)
