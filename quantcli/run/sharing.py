"""What the processes that share a quantization must have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from quantcli import __version__
from quantcli.artifacts.fingerprint import sample_model
from quantcli.artifacts.shared_write import Sharing
from quantcli.plan.recipe_file import dump_recipe
from quantcli.ranks.meeting import COUNT, read_timeout
from quantcli.ranks.share import Share
from quantcli.run.outputs import Planned
from quantcli.run.request import Request
from quantcli.run.set_journal import digest_file


def share_with_others(request: Request, share: Share, planned: Sequence[Planned]) -> Sharing:
    """What this process tells the others of itself, and holds them against."""
    recipes = [each.artifact.plan.recipe for each in planned]
    named = sorted({
        file
        for recipe in recipes
        for file in (recipe.imatrix, recipe.chat_template, recipe.statistics)
        if file
    } | set(request.texts))  # fmt: skip
    models = {id(each.artifact.model): each.artifact.model for each in planned}
    sizes = [[path.name for path in each.artifact.paths] for each in planned]
    facts = {
        COUNT: str(share.count),
        "quantcli's version": __version__,
        "their model": _digest([sample_model(model) for model in models.values()]),
        "their recipe": _digest([dump_recipe(recipe) for recipe in recipes]),
        "the files that the recipe names": _digest([digest_file(Path(name)) for name in named]),
        "the names of their outputs": _digest(sizes),
        "the size of their outputs": _digest([each.artifact.nbytes for each in planned]),
        "--chunks": str(request.chunks),
    }
    if share.merges:
        del facts[COUNT]
    return Sharing(share, facts, read_timeout())


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
