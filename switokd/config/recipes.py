"""The recipes: run files that ship with switokd.

Not covered: reading a recipe as a configuration (`run_file.py`).
"""

from __future__ import annotations

from importlib import resources

from switokd.errors import UsageError, nearest


def recipes() -> list[str]:
    """Return the names of all recipes, sorted."""
    folder = resources.files("switokd.recipes")
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """Return the YAML text of a recipe; UsageError if there is no recipe of this name."""
    if name not in recipes():
        raise UsageError(
            f"{name}: no such run file, and no recipe of that name{nearest(name, recipes())} "
            f"(recipes: {', '.join(recipes())})"
        )
    return (resources.files("switokd.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
