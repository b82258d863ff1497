"""The user's own networks, data sets and strategies: by import string, or as objects.

A configuration is text. An object of the user's program has a placeholder name in it, such as
"<object large: ResNet>". `lent` lends the objects under these names to `models` and `data`.

Not covered: objects in other processes, which cannot reach them; there the run file names what to
import.
"""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from switokd.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

# A variable of the context, so that runs in two threads do not find each other's.
_lent: ContextVar[Mapping[str, Any]] = ContextVar("_lent", default=MappingProxyType({}))


def add_import_folders(folders: Iterable[str]) -> None:
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


@dataclass(frozen=True)
class Datasets:
    """Training and test set: map-style, of (image, label)."""

    train: Any
    test: Any
    classes: int | None = None
    """How many; None: what the training set says, or its largest label."""


def name_of(role: str, thing: Any) -> str:
    """The text that stands for an object in a configuration. `role` makes it unique in a run."""
    return f"<object {role}: {getattr(thing, '__name__', type(thing).__name__)}>"


def is_object(name: str) -> bool:
    """Whether a name in a configuration stands for an object."""
    return name.startswith("<object ")


@contextmanager
def lend(things: Mapping[str, Any]) -> Iterator[None]:
    """Within the body these objects are found under their names."""
    token = _lent.set(things)
    try:
        yield
    finally:
        _lent.reset(token)


def factory(name: str) -> Callable[..., nn.Module]:
    """What makes the network of this name: the factory given, or a copy of the module given.

    A copy, so that training leaves the caller's module as it is. UsageError if it was not given.
    """
    from torch import nn  # here, because a configuration is read without torch as well

    thing = _find(name, "model")
    return (lambda: copy.deepcopy(thing)) if isinstance(thing, nn.Module) else thing


def datasets(name: str) -> Datasets:
    """The data sets of this name; UsageError if they were not given."""
    found = _find(name, "data.dataset")
    assert isinstance(found, Datasets)
    return found


def _find(name: str, what: str) -> Any:
    things = _lent.get()
    if name not in things:
        raise UsageError(
            f"{what} {name} is an object of the program that trained, which no file holds: give "
            "it again to switokd.load_run (networks=..., train=..., test=...); a run file would "
            "name it as package.module:callable"
        )
    return things[name]
