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
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.machinery import PathFinder
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from switokd import errors
from switokd.errors import OwnCodeError, UsageError

if TYPE_CHECKING:
    from torch import nn

TIMM = "timm:"
"""How the name of a network of timm begins, which is no module of the user's own."""
IMPORT_STRING = re.compile(r"\w+(\.\w+)*:\w+")
NO_MODULE = (
    "there is no module '{}'; it must be installed, or be in the current folder or beside the run "
    "file"
)
# A context variable keeps the objects of runs in two threads apart.
_lent: ContextVar[Mapping[str, Any]] = ContextVar("_lent", default=MappingProxyType({}))


def add_import_folders(folders: Iterable[str]) -> None:
    """Let Python import modules from these folders for the rest of the process."""
    for folder in folders:
        if folder not in sys.path:
            # Last, after the standard library and what is installed: a queue.py or a yaml.py there
            # must not hide the module that all others mean.
            sys.path.append(folder)


def import_callable(text: str, setting: str) -> Callable[..., Any]:
    """Import `package.module:callable`; UsageError if there is no such module or callable.

    setting: names the setting in the error. OwnCodeError for an error of the module's own code.
    """
    if not IMPORT_STRING.fullmatch(text):
        raise UsageError(f"{setting} {text}: write package.module:callable")
    module_name, _, attribute = text.partition(":")
    errors.own_packages.update({module_name.partition(".")[0]} - {"torch"})
    try:
        with errors.own_code_errors(f"{setting} {text}", __file__, every_rank=True):
            module = importlib.import_module(module_name)
    except OwnCodeError as error:
        cause = error.__cause__
        name = (cause.name or "") if isinstance(cause, ImportError) else ""
        if hidden := _hidden(name):
            raise UsageError(f"{setting} {text}: {cause}; {hidden}") from None
        is_missing = isinstance(cause, ModuleNotFoundError)
        if not (is_missing and name and f"{module_name}.".startswith(f"{name}.")):
            raise
        raise UsageError(f"{setting} {text}: {NO_MODULE.format(name)}") from None
    imported = getattr(module, attribute, None)
    if not callable(imported):
        state = "not callable" if hasattr(module, attribute) else "not there"
        hidden = f"; {hidden}" if (hidden := _hidden(module_name)) else ""
        raise UsageError(
            f"{setting} {text}: {attribute!r} is {state} in module {module_name}{hidden}"
        )
    return imported  # type: ignore[no-any-return]


def problem_with_module(text: str, setting: str) -> str:
    """Say what is wrong with `package.module:callable` without an import; empty if nothing is seen.

    The package alone is looked for: a look at its modules would import it.
    """
    if not IMPORT_STRING.fullmatch(text):
        return f"{setting} {text}: write package.module:callable"
    package = text.partition(":")[0].partition(".")[0]
    if package in sys.modules or importlib.util.find_spec(package):
        return ""
    return f"{setting} {text}: {NO_MODULE.format(package)}"


def own_modules_in(run_file: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    """Yield the settings that name a user's own code, and package.module:callable.

    run_file: its content, whose values may be invalid.
    """
    for setting, text in _names_in(run_file):
        is_import = isinstance(text, str) and ":" in text and not text.startswith(TIMM)
        if is_import and not is_object(text):
            yield setting, text


def _names_in(run_file: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings that may name a user's own code, with their values."""
    networks, observers = run_file.get("networks"), run_file.get("observers")
    for name, network in networks.items() if isinstance(networks, Mapping) else ():
        if isinstance(network, Mapping):
            yield f"networks.{name}.model", network.get("model")
    for section, key in (("data", "dataset"), ("distillation", "strategy")):
        if isinstance(content := run_file.get(section), Mapping):
            yield f"{section}.{key}", content.get(key)
    for name in observers if isinstance(observers, list | tuple) else ():
        yield "observers", name


def _hidden(module_name: str) -> str:
    """Name the file whose module has the name of an imported one, and what to do; else empty.

    The imported module comes earlier on the import path, such as one of the standard library.
    """
    name = module_name.partition(".")[0]
    if name not in sys.modules:
        return ""
    used = getattr(sys.modules[name], "__file__", None) or "Python itself"
    specs = (PathFinder.find_spec(name, [folder]) for folder in sys.path)
    for file in (spec.origin for spec in specs if spec and spec.origin):
        if os.path.realpath(file) != os.path.realpath(used):
            return f"{file} is hidden by the module {name} of {used}: rename the file"
    return ""


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
