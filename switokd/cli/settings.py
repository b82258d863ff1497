"""The commands `switokd settings` and `switokd recipes`: what a run file may say.

Not covered: the settings themselves (`config/sections.py`).
"""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from switokd.cli.arguments import fail
from switokd.config.base import Section
from switokd.config.config import known_settings
from switokd.config.recipes import recipe_text
from switokd.config.recipes import recipes as recipe_names
from switokd.config.run_file import load
from switokd.errors import SwitokdError


def recipes(
    name: Annotated[Optional[str], typer.Argument(help="Print this recipe's run file.")] = None,  # noqa: UP045
) -> None:
    """List the run files that ship with switokd, or print one to start your own from."""
    try:
        if name is not None:
            print(recipe_text(name), end="")
            return
        width = max(len(each) for each in recipe_names())
        for each in recipe_names():
            config = load(each)
            print(f"{each:<{width}}  {config.topology.name}  {config.description}")
    except SwitokdError as error:
        fail(error)


def settings() -> None:
    """List every setting of a run file with its default and meaning."""
    for key, field in known_settings():
        if isinstance(field.default, Section) or key in ("networks", "pairs"):
            print(f"\n# {field.description or key}")
            continue
        default = "" if field.is_required() else json.dumps(field.default)
        print(f"{key:<37} {default:<14} {field.description or ''}".rstrip())
