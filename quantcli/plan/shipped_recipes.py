"""The recipes that come with quantcli, found by name: `--recipe q4_k_m-head8`.

They are the files of `configs/`. A wheel holds them inside of the package, a checkout beside it.
"""

from __future__ import annotations

from pathlib import Path

from quantcli.errors import UsageError
from quantcli.registry import near

_PACKAGE = Path(__file__).parents[1]


def shipped_recipes() -> dict[str, Path]:
    """Each recipe's name and file, in alphabetical order."""
    inside = _PACKAGE / "configs"
    folder = inside if inside.is_dir() else _PACKAGE.parent / "configs"
    return dict(sorted((path.stem, path) for path in folder.glob("*.toml")))


def find_recipe(path: Path) -> Path:
    """``path`` where it is a file or names one; the shipped recipe where it is a bare name.

    UsageError where a bare name is neither; a path with a folder or a suffix is returned as it is.
    """
    if path.exists() or path.suffix or path.name != str(path):
        return path
    recipes = shipped_recipes()
    if path.name in recipes:
        return recipes[path.name]
    guesses, known = near(path.name, recipes), f"those that do: {', '.join(recipes)}"
    raise UsageError(
        f"recipe {path}: there is no such file, and no recipe of that name comes with quantcli",
        hint=f"did you mean {' or '.join(guesses)}? {known}" if guesses else known,
    )
