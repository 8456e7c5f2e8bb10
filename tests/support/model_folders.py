"""Makes model folders of the small real model, or of another, through the whole of quantcli."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
CHECKPOINT = DATA / "bookworm-mini"
TEXT = DATA / "pride-and-prejudice.txt"


def make_folder(source: Path, output: Path, *, threads: int = 2, **recipe: Any) -> list[Any]:
    """Make ``output`` of ``source``; the events."""
    from quantcli.artifacts.model_folder import prepare_folder
    from quantcli.artifacts.write import write_artifact
    from quantcli.model import open_model
    from quantcli.plan.recipe import Recipe
    from quantcli.sources.imatrix import read_importance

    importance = read_importance(Path(recipe["imatrix"])) if "imatrix" in recipe else None
    with open_model(source, vocabulary=False) as model:
        job = prepare_folder(model, Recipe(**recipe), output, importance=importance)
        return list(write_artifact(job, threads=threads))


def linear_names(weights: dict[str, Any]) -> list[str]:
    """Names of the weights of the blocks' linear layers."""
    return [name for name in weights if re.search(r"layers\.\d+\..*_proj\.weight", name)]
