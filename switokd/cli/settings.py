"""The commands `switokd settings` and `switokd recipes`: what a run file may contain.

Not covered: the settings themselves (`config/sections.py`).
"""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from switokd.cli.arguments import fail
from switokd.errors import SwitokdError


def recipes(
    name: Annotated[
        Optional[str],  # noqa: UP045, typer reads it at run time
        typer.Argument(help="Recipe to print as a run file. Default: list all recipes."),
    ] = None,
) -> None:
    """List the recipes, which are run files that ship with switokd, or print one.

    For example:

    switokd recipes

    switokd recipes digits-2t1s > mine.yaml

    The list has a line per recipe: name, teachers and students (2T1S), description.
    """
    from switokd.config.recipes import recipe_text
    from switokd.config.recipes import recipes as recipe_names
    from switokd.config.run_file import load

    try:
        if name is not None:
            print(recipe_text(name), end="")
            return
        names = recipe_names()
        width = max(len(recipe) for recipe in names)
        for recipe in names:
            config = load(recipe)
            print(f"{recipe:<{width}}  {config.topology.name}  {config.description}")
    except SwitokdError as error:
        fail(error)


def settings() -> None:
    """List every setting of a run file with its default and meaning.

    A setting can be written in a run file, or on the command line as KEY.KEY=VALUE:

    switokd train digits-2t1s schedule.epochs=5
    """
    from switokd.config.base import Section
    from switokd.config.config import known_settings

    for key, field in known_settings():
        if isinstance(field.default, Section) or key in ("networks", "pairs"):
            print(f"\n# {field.description or key}")
            continue
        default = "" if field.is_required() else json.dumps(field.default)
        print(f"{key:<37} {default:<14} {field.description or ''}".rstrip())
