"""Reading a run file: recipe or path, settings on top, errors of one line.

A run file is YAML of the shape in `config.py`. Values are checked strictly (no "3" for 3),
unknown keys are errors, and each error is one line that names file, key, what was found, what
is allowed and, for a key, the nearest known one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from switokd.config.config import Config
from switokd.config.explain import explain
from switokd.config.recipes import recipe_text
from switokd.config.templates import spell_out
from switokd.config.yaml_loader import parse_yaml
from switokd.errors import UsageError
from switokd.plugins import add_import_folders


def load(recipe_or_file: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe by name or a run file by path, apply `key.key=value` settings, check it.

    UsageError, of one line, for anything wrong in either.
    """
    path = Path(recipe_or_file)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a run file in it, or a recipe")
    looks_like_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or path.is_file()
    try:
        text = path.read_text(encoding="utf-8") if looks_like_path else recipe_text(recipe_or_file)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"{path}: cannot be read as a run file: {reason}") from None
    raw = parse_yaml(text, recipe_or_file)
    if not isinstance(raw, dict):
        raise UsageError(
            f"{recipe_or_file}: a run file holds keys and values, see 'switokd recipes'"
        )
    return checked(raw, recipe_or_file, overrides)


def checked(raw: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Apply settings to a run file's content (changing it), check it.

    UsageError, of one line that begins with `source`, for anything wrong in either.
    """
    for override in overrides:
        _apply(override, raw)
    try:
        raw = spell_out(raw)
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from None
    try:
        return Config.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        key, sentence = explain(error, raw)
    settings = [o for o in overrides if _concerns(o.partition("=")[0], key)]
    where = f"{source} with {settings[-1]}" if settings else source
    raise UsageError(" ".join(f"{where}: {sentence}".split()))


def load_importable(recipe_or_file: str, overrides: Sequence[str] = ()) -> Config:
    """`load`; from then on the file's folder can be imported from, like the current one.

    Where the run has modules of the user's, import_from says so from then on, so that they are
    found again when the run folder's config.yaml is read elsewhere.
    """
    config = load(recipe_or_file, overrides)
    beside = Path(recipe_or_file).resolve().parent
    add_import_folders(import_folders(config, beside))
    _ = config.method  # a strategy of the user's own can be imported now: its mistakes show here
    return with_folders(config, beside)


def import_folders(config: Config, beside: Path) -> list[str]:
    """Where a run's own modules are looked for: import_from, `beside`, and the current folder.

    beside: the run file's folder, from which the relative ones of import_from count.
    """
    own = [str(beside / folder) for folder in config.import_from]
    return list(dict.fromkeys([*own, str(beside), os.getcwd()]))


def with_folders(config: Config, beside: Path) -> Config:
    """The same with its `import_folders` as import_from, if it has modules of the user's."""
    if not config.has_own_modules:
        return config
    return config.model_copy(update={"import_from": tuple(import_folders(config, beside))})


def _concerns(setting: str, key: str) -> bool:
    """Whether one of the dotted keys is, or lies below, the other."""
    return all(a == b for a, b in zip(setting.split("."), key.split("."), strict=False))


def _apply(override: str, raw: dict[str, Any]) -> None:
    """Set one `key.key=value` in the raw mapping."""
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
