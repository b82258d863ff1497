"""Reading a run file: recipe or path, settings on top, errors of one line.

A run file is YAML of the shape in `config.py`. Values are checked strictly (no "3" for 3),
unknown keys are errors, and each error is one line that names file, key, what was found, what
is allowed and, for a key, the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from switokd.config import Config, known_settings
from switokd.errors import UsageError, nearest
from switokd.imports import look_in
from switokd.sections import SGD, Adam, AdamW
from switokd.templates import spell_out


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 5e-4 is a number, a key given twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key, mark = loader.construct_object(key_node, deep=True), key_node.start_mark
        if not isinstance(key, str | int | float):
            raise yaml.MarkedYAMLError(problem=f"{key!r} cannot be a key", problem_mark=mark)
        if isinstance(key, bool):
            raise yaml.MarkedYAMLError(
                problem=f"the key {key_node.value} is a truth value in YAML; quote it",
                problem_mark=mark,
            )
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is there twice", problem_mark=mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def recipes() -> list[str]:
    """Names of the run files that ship with the package."""
    folder = resources.files("switokd.recipes")
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """A shipped run file; UsageError if there is none of that name."""
    if name not in recipes():
        raise UsageError(
            f"{name}: no such run file, and no recipe of that name{nearest(name, recipes())} "
            f"(recipes: {', '.join(recipes())})"
        )
    return (resources.files("switokd.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


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
    raw = _parse(text, recipe_or_file)
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
        key, sentence = _explain(error, raw)
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
    look_in(import_folders(config, beside))
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


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{where}{line}: not valid YAML: {problem}") from None


def parse_value(text: str, where: str) -> Any:
    """Read one value as a run file would; UsageError, with `where`, if it is no YAML."""
    return _parse(text, where)


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
    node[last] = _parse(text, repr(override))


OPTIMIZER_KEYS = {*SGD.model_fields, *Adam.model_fields, *AdamW.model_fields}
PLAIN_WORDS = {
    "a valid integer": "a whole number",
    "a valid array": "a list",
    "an object": "keys and values",
    "valid ": "",
}


def _explain(error: ValidationError, raw: Mapping[str, Any]) -> tuple[str, str]:
    """Key of the first problem, and the problem in words: what was found, what is allowed."""
    problems = error.errors(include_url=False)
    # A misspelt key is missing as well; the misspelling is the better news.
    problem, *others = sorted(problems, key=lambda p: p["type"] != "extra_forbidden")
    more = f" (and {len(others)} more)" if others else ""
    kind, loc = problem["type"], problem["loc"]
    if kind == "model_type" and loc[-2:-1] == ("optimizer",):  # the last names a kind of them
        loc = loc[:-1]
    key = ".".join(_keys(loc, raw))
    allowed = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not loc:  # two sections that do not go together: the sentence names them
        return "", allowed + more
    if kind == "extra_forbidden" and ".optimizer." in key and loc[-1] in OPTIMIZER_KEYS:
        section = key.rpartition(".")[0]
        sentence = (
            f"{key} is no setting of {loc[-2]}; to change the optimizer set all of it, like "
            f"{section}={{name: adam, lr: 1e-3}}"
        )
    elif kind == "model_type" and loc[-1] == "optimizer":
        found = _short(problem["input"])
        sentence = f"{key}: found {found}; allowed: keys and values, like {{name: adam, lr: 1e-3}}"
    elif kind == "extra_forbidden":
        sentence = f"unknown key {key}{_nearest_key(key)}"
    elif kind == "missing" and len(loc) == 3 and not _is_network(problem["input"]):
        known = [name for name, given in raw["networks"].items() if _is_network(given)]
        sentence = (
            f"networks.{loc[1]} has neither role nor model{nearest(str(loc[1]), known)} "
            f"(networks: {', '.join(known) or 'none'})"
        )
    elif kind == "missing":
        sentence = f"{key} is missing"
    elif kind == "union_tag_invalid":
        sentence = f"{key}.name: found {problem['ctx']['tag']}; allowed: 'sgd', 'adam', 'adamw'"
    elif loc[-1] == "[key]":
        sentence = f"{key} is no name for a network; allowed: letters, digits, '-' and '_'"
    else:
        if kind == "string_pattern_mismatch":
            allowed = "letters, digits, '.', '_' and '-', a letter or digit first"
        if kind not in ("value_error", "assertion_error"):  # those are our own sentences
            for pydantics, plain in PLAIN_WORDS.items():
                allowed = allowed.replace(pydantics, plain)
        sentence = f"{key}: found {_short(problem['input'])}; allowed: {allowed}"
    return key, sentence + more


def _is_network(given: Any) -> bool:
    """Whether it is meant to be one, and not a setting of another whose name is misspelt."""
    return isinstance(given, dict) and ("role" in given or "model" in given)


def _keys(loc: Sequence[str | int], raw: Any) -> Iterator[str]:
    """The location's keys as the user wrote them, without pydantic's names of union members."""
    for i, part in enumerate(loc):
        is_there = (isinstance(raw, dict) and part in raw) or isinstance(raw, list)
        if is_there:
            raw = raw[part]
        elif i < len(loc) - 1 or part == "[key]":
            continue
        yield str(part)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nearest_key(key: str) -> str:
    """Say ", did you mean": a close key of the same section, else of the whole file."""
    parts = key.split(".")
    network = parts[1] if parts[0] == "networks" and len(parts) > 2 else "NAME"
    pair = ".".join(parts[1:3]) if parts[0] == "pairs" and len(parts) > 3 else "TEACHER.STUDENT"
    every = (
        k.replace("NAME", network).replace("TEACHER.STUDENT", pair) for k, _ in known_settings()
    )
    known = [k for k in every if k != key]
    section, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    everywhere = {k.rpartition(".")[2]: k for k in reversed(known)}
    close = [siblings[leaf] for leaf in difflib.get_close_matches(leaf, siblings, n=1)]
    close += [everywhere[leaf] for leaf in difflib.get_close_matches(leaf, everywhere, 1, 0.8)]
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known keys here: {', '.join(siblings)}"
