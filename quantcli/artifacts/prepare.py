"""What a recipe makes: a GGUF file or a model folder, and what it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.model import Model
from quantcli.plan.recipe import Recipe
from quantcli.plan.schemes import GGUF, has_types, knows_importance, scheme_name
from quantcli.sources.imatrix import Importance

if TYPE_CHECKING:
    from quantcli.artifacts.gguf_file import GgufFile
    from quantcli.artifacts.model_folder import ModelFolder


def model_name(model: Model) -> str:
    """What outputs are called after: the repository, the folder or the file."""
    return model.repo.rpartition("/")[2] if model.repo else model.path.resolve().name


def default_output(model: Model, recipe: Recipe) -> Path:
    """``NAME-TYPE.gguf`` or ``NAME-TO-...`` in the current folder, ``mmproj-...`` for a tower.

    NAME is that of the repository, the folder or the file.
    """
    name = model_name(model)
    if recipe.mmproj_only:
        return Path(f"mmproj-{name}-{recipe.type}.gguf")
    if recipe.to == GGUF:
        return Path(f"{name.removesuffix('.gguf')}-{recipe.type}.gguf")
    if has_types(recipe.to):
        return Path(f"{name}-hf-{recipe.type}")
    scheme = scheme_name(recipe)
    return Path(
        f"{name}-{scheme}" if scheme.startswith(recipe.to) else f"{name}-{recipe.to}-{scheme}"
    )


def prepare_artifact(
    model: Model,
    recipe: Recipe,
    output: Path,
    *,
    importance: Importance | None = None,
    force: bool = False,
    check: bool = True,
) -> GgufFile | ModelFolder:
    """Decide everything about making ``output`` of ``model`` without reading a weight.

    ``importance`` is left out where the recipe says that ranges are found without it.
    ``check=False`` leaves out the checks on the output's place (for a dry run). Raises PlanError,
    OutputError or UsageError before any work is done.
    """
    if recipe.to != GGUF and not knows_importance(recipe):
        importance = None
    if recipe.to == GGUF:
        from quantcli.artifacts.gguf_file import prepare_gguf as prepare
    else:
        from quantcli.artifacts.model_folder import prepare_folder as prepare  # type: ignore[assignment]
    return prepare(model, recipe, output, importance=importance, force=force, check=check)
