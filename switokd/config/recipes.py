"""The run files that ship with switokd."""

from __future__ import annotations

from importlib import resources

from switokd.errors import UsageError, nearest


def recipes() -> list[str]:
    """Names of the run files that ship with the package."""
    folder = resources.files("switokd.recipes")
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """A shipped run file; UsageError if there is none of that name."""
    if name not in recipes():
        raise UsageError(
            f"{name}: no such run file, and no recipe of that name{nearest(name, recipes())} "
            f"(recipes: {', '.join(recipes())})"
        )
    return (resources.files("switokd.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
