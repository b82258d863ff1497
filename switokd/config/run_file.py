"""Reads a run file: a recipe or a path, with `key.key=value` settings on top.

A run file is YAML with the keys of `Config`. Values are checked strictly ("3" is no number), and
unknown keys are errors. All problems are told, each in one line. It names the file and its line, or
the setting; the key, the value and the allowed values; for an unknown key, the nearest known one.

Not covered: the sentences about invalid values (`explain.py`), their places (`places.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from switokd.config.config import Config
from switokd.config.explain import explain
from switokd.config.places import Places, RunFileText
from switokd.config.recipes import recipe_text
from switokd.config.templates import spell_out
from switokd.config.yaml_loader import parse_yaml
from switokd.errors import UsageError
from switokd.plugins import add_import_folders, own_modules_in, problem_with_module

SETTINGS = "command line"
"""Where settings are given, unless a program gives them."""


def load(recipe_or_file: str, overrides: Sequence[str] = (), given: str = SETTINGS) -> Config:
    """Read a recipe by name or a run file by path, apply `key.key=value` settings, and check.

    given: where the settings come from, for messages. UsageError if the file or settings are
    invalid, with a line per problem.
    """
    raw, text = _read(recipe_or_file)
    return checked(raw, RunFileText(recipe_or_file, text), overrides, given)


def _read(recipe_or_file: str) -> tuple[dict[str, Any], str]:
    """Return the content of a recipe or run file, and its text. UsageError if it has no keys."""
    path = Path(recipe_or_file)
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder; name a run file in it, or a recipe")
    looks_like_path = (
        path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or os.path.isfile(path)
    )
    try:
        text = path.read_text(encoding="utf-8") if looks_like_path else recipe_text(recipe_or_file)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"{path}: cannot be read as a run file: {reason}") from None
    raw = parse_yaml(text, recipe_or_file, is_file=True)
    if not isinstance(raw, dict):
        raise UsageError(
            f"{recipe_or_file}: a run file holds keys and values, see 'switokd recipes'"
        )
    return raw, text


def checked(
    raw: dict[str, Any], source: RunFileText, overrides: Sequence[str] = (), given: str = SETTINGS
) -> Config:
    """Apply settings to a run file's content, which is changed, and check the result.

    given: as in `load`. UsageError if the content or settings are invalid: a line per problem,
    which begins with the file and the line, or with the setting.
    """
    problems, applied = [], []
    for override in overrides:
        try:
            _apply(override, raw)
            applied.append(override)
        except UsageError as error:  # noqa: PERF203 all problems are told
            problems.append(f"{given}, {error}")
    places = Places(source, applied, given)
    try:
        _check_sizes(raw, ())
        raw = spell_out(raw)
        config = Config.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        problems += [f"{places.of(key, said)}: {said}" for key, said in explain(error, raw)]
    except ValueError as error:
        problems.append(f"{places.of('', str(error))}: {error}")
    if problems:
        raise UsageError("\n".join(" ".join(problem.split()) for problem in problems))
    return config


def load_importable(recipe_or_file: str, overrides: Sequence[str] = ()) -> Config:
    """`load` a run file and let modules be imported from its folder and from the current one.

    If the run uses the user's own modules, the result's `import_from` names these folders, so that
    the run folder's config.yaml finds the modules from anywhere.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the current folder was deleted; change to another one by cd") from None
    beside = Path(recipe_or_file).resolve().parent
    try:
        config = load(recipe_or_file, overrides)
    except UsageError as error:
        if missing := _missing_modules(recipe_or_file, overrides, beside):
            raise UsageError("\n".join([str(error), *missing])) from None
        raise
    add_import_folders(import_folders(config, beside))
    _check_own_modules(config)
    return with_folders(config, beside)


def _check_own_modules(config: Config) -> None:
    """UsageError, with a line for each, if modules of the user's own are not there.

    The strategy is made as well, because it decides what else fits.
    """
    problems = _problems_of(config.own_modules)
    try:
        _ = config.method
    except UsageError as error:
        if not problems:
            raise
        problems += [str(error)] if str(error) not in problems else []
    if problems:
        raise UsageError("\n".join(problems))


def _missing_modules(recipe_or_file: str, overrides: Sequence[str], beside: Path) -> list[str]:
    """Describe the modules that are missing besides other mistakes of a run file."""
    try:
        raw, _ = _read(recipe_or_file)
    except UsageError:  # which has been told
        return []
    for override in overrides:
        with suppress(UsageError):
            _apply(override, raw)
    folders = raw.get("import_from")
    named = folders if isinstance(folders, list) else []
    add_import_folders([*(str(beside / str(each)) for each in named), str(beside), os.getcwd()])
    return _problems_of(own_modules_in(raw))


def _problems_of(named: Iterable[tuple[str, str]]) -> list[str]:
    """Describe the modules that are missing. named: settings with their texts."""
    problems = (problem_with_module(text, setting) for setting, text in named)
    return [problem for problem in problems if problem]


def import_folders(config: Config, beside: Path) -> list[str]:
    """Return the folders of a run's own modules: import_from, `beside`, the current folder.

    beside: the run file's folder; relative folders of import_from start from it.
    """
    named = [str(beside / folder) for folder in config.import_from]
    return list(dict.fromkeys([*named, str(beside), os.getcwd()]))


def with_folders(config: Config, beside: Path) -> Config:
    """Return the configuration with `import_folders` in import_from.

    A configuration without modules of the user is returned unchanged.
    """
    if not config.own_modules:
        return config
    return config.model_copy(update={"import_from": tuple(import_folders(config, beside))})


def _check_sizes(value: Any, keys: tuple[str, ...]) -> None:
    """ValueError, with the dotted key, for a whole number outside -2^63 to 2^63."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(
            f"{'.'.join(keys)}: found a number of {len(str(abs(value)))} digits; allowed: whole "
            "numbers from -2^63 to 2^63"
        )
    inner = dict(enumerate(value)) if isinstance(value, list) else value
    for key, item in inner.items() if isinstance(inner, dict) else ():
        _check_sizes(item, (*keys, str(key)))


def _apply(override: str, raw: dict[str, Any]) -> None:
    """Set one `key.key=value` in the raw mapping; UsageError if that is not possible."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UsageError(
            f"{override!r}: a setting is written key.key=value, like schedule.epochs=3"
        )
    *parents, last = dotted.split(".")
    node = raw
    for depth, parent in enumerate(parents, 1):
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            at = ".".join(parents[:depth])
            raise UsageError(f"{override!r}: {at} is {child!r}, which has no keys below it")
        node = child
    node[last] = parse_yaml(text, repr(override))
