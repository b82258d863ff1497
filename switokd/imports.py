"""Objects of the user's own modules, by import string."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from switokd.errors import UsageError


def look_in(folders: Iterable[str]) -> None:
    """Let modules be imported from these folders as well."""
    for folder in folders:
        if folder not in sys.path:
            sys.path.append(folder)  # behind all others: a yaml.py there must not hide yaml


def import_callable(text: str, what: str) -> Callable[..., Any]:
    """Import `package.module:callable`; UsageError if that is not there. `what` names its use.

    Errors inside the module itself pass through with their traceback: they are the module's.
    """
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", text):
        raise UsageError(f"{what} {text}: write package.module:callable")
    module_name, _, attribute = text.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(
            f"{what} {text}: there is no module {error.name!r}; it must be installed, or lie in "
            "the current folder or beside the run file"
        ) from None
    found = getattr(module, attribute, None)
    if not callable(found):
        state = "not callable" if hasattr(module, attribute) else "not there"
        raise UsageError(f"{what} {text}: {attribute!r} is {state} in module {module_name}")
    return found  # type: ignore[no-any-return]
