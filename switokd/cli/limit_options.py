"""Options of a command that are the fields of a dataclass of numbers, such as `Limits`.

Torch-free.

Not covered: options with a meaning of their own; they are parameters of their command.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any

import typer

from switokd.cli.arguments import number_between, number_option
from switokd.services.coordinator.limits import option


def options_of(settings: type[Any], panel: str) -> Callable[..., Any]:
    """Return a function for `option_groups` with an option for each field of a dataclass.

    It returns an instance of the dataclass. A field's metadata are `help`, `least` and `most`.
    panel: heading of the options in the help.
    """

    def make(**values: Any) -> Any:
        return settings(**values)

    parameters = [_parameter(each, panel) for each in fields(settings)]
    vars(make)["__signature__"] = inspect.Signature(parameters)
    return make


def _parameter(of: Field[Any], panel: str) -> inspect.Parameter:
    least, most = of.metadata["least"], of.metadata["most"]
    names, text = (option(of.name),), of.metadata["help"]
    is_whole = isinstance(of.default, int)
    info = (
        number_option(least, most, names, help=text)
        if is_whole
        else typer.Option(*names, parser=number_between(least, most), metavar="X", help=text)
    )
    info.rich_help_panel = panel
    return inspect.Parameter(
        of.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=of.default,
        annotation=Annotated[int if is_whole else float, info],
    )
