"""The user's own networks, data sets and strategies: by import string, or as objects.

An import string is "package.module:callable". An object of the user's program has a placeholder
name in the configuration, such as "<object large: ResNet>", because a configuration is text.
`lend` makes the objects available under these names to `models` and `data`.

Torch-free on import. Not covered: objects in other processes, which have no access to them. A run
of several processes needs import strings.
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

# A context variable keeps the objects of runs in two threads apart.
_lent: ContextVar[Mapping[str, Any]] = ContextVar("_lent", default=MappingProxyType({}))


def add_import_folders(folders: Iterable[str]) -> None:
    """Let Python import modules from these folders for the rest of the process."""
    for folder in folders:
        if folder not in sys.path:
            sys.path.append(folder)  # last: a yaml.py there must not hide the package yaml


def import_callable(text: str, setting: str) -> Callable[..., Any]:
    """Import `package.module:callable`; UsageError if there is no such module or callable.

    setting: names the setting in the error. Errors raised by the module's own code pass through,
    with their traceback.
    """
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", text):
        raise UsageError(f"{setting} {text}: write package.module:callable")
    module_name, _, attribute = text.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(
            f"{setting} {text}: there is no module {error.name!r}; it must be installed, or be in "
            "the current folder or beside the run file"
        ) from None
    imported = getattr(module, attribute, None)
    if not callable(imported):
        state = "not callable" if hasattr(module, attribute) else "not there"
        raise UsageError(f"{setting} {text}: {attribute!r} is {state} in module {module_name}")
    return imported  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Datasets:
    """The user's training and test set: map-style data sets of (image, label)."""

    train: Any
    test: Any
    classes: int | None = None
    """Number of classes; None: the training set's `classes`, or one more than its largest label."""


def name_of(role: str, thing: Any) -> str:
    """Return the placeholder name of an object in a configuration.

    role: makes the name unique in a run, such as the network's name.
    """
    return f"<object {role}: {getattr(thing, '__name__', type(thing).__name__)}>"


def is_object(name: str) -> bool:
    """Whether a name in a configuration is the placeholder of an object."""
    return name.startswith("<object ")


@contextmanager
def lend(things: Mapping[str, Any]) -> Iterator[None]:
    """Make objects available by their placeholder names inside the `with` block."""
    token = _lent.set(things)
    try:
        yield
    finally:
        _lent.reset(token)


def factory(name: str) -> Callable[..., nn.Module]:
    """Return a callable that makes the network of this placeholder name.

    It is the lent callable, or one that copies the lent module, so that training does not change
    the caller's module. UsageError if no object of this name was lent.
    """
    from torch import nn  # here, because a configuration is also read without torch

    thing = _lent_object(name, "model")
    return (lambda: copy.deepcopy(thing)) if isinstance(thing, nn.Module) else thing


def datasets(name: str) -> Datasets:
    """Return the data sets of this placeholder name; UsageError if they were not lent."""
    lent = _lent_object(name, "data.dataset")
    assert isinstance(lent, Datasets)
    return lent


def _lent_object(name: str, setting: str) -> Any:
    """Return the object that was lent under a name; UsageError if there is none."""
    objects = _lent.get()
    if name not in objects:
        raise UsageError(
            f"{setting} {name} is an object of the program that trained, and is in no file: pass "
            "it to switokd.load_run again (networks=..., train=..., test=...), or name it as "
            "package.module:callable in a run file"
        )
    return objects[name]
