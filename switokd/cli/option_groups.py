"""Options that belong together, as one argument of a command.

Not covered: what the options mean; each group is in a module of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any


def option_groups(
    **groups: Callable[..., object],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of each group's function, which are the function's parameters.

    Instead of their values, the command gets an argument for each group, by the group's name: a
    function without arguments that returns what the group's function returns for them. The options
    come behind those of the command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = {name: _parameters(make) for name, make in groups.items()}

        @functools.wraps(command)
        def with_groups(**given: Any) -> None:
            arguments: dict[str, Any] = {}
            for name, make in groups.items():
                values = {key: given.pop(key) for key in options[name] if key in given}
                arguments[name] = functools.partial(make, **values)
            command(**given, **arguments)

        parameters = list(_parameters(command, leave_out=groups).values())
        for of_group in options.values():
            parameters += of_group.values()
        with_groups.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_groups.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_groups

    return decorate


def _parameters(
    function: Callable[..., object], leave_out: Collection[str] = ()
) -> dict[str, inspect.Parameter]:
    """Return a function's parameters by name, each with its annotation as an object."""
    names = inspect.unwrap(function).__globals__
    return {
        name: parameter.replace(
            annotation=eval(parameter.annotation, names)
            if isinstance(parameter.annotation, str)
            else parameter.annotation,
            kind=inspect.Parameter.KEYWORD_ONLY,
        )
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in leave_out
    }
