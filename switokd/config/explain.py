"""Explain an error of pydantic, a line per problem: key, value, allowed values, nearest key.

Not covered: errors before pydantic sees the values (`yaml_loader.py`, `templates.py`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from switokd.config.config import known_settings
from switokd.config.optimizers import SGD, Adam, AdamW
from switokd.errors import nearest

OPTIMIZER_KEYS = {*SGD.model_fields, *Adam.model_fields, *AdamW.model_fields}
NETWORK_KEYS = {"role", "model"}
"""What a network needs."""

TABLES = ("placement", "paused")
"""Values that may be tables, but are no sections."""

PLAIN_WORDS = {
    "a valid integer": "a whole number",
    "a valid string": "text (in quotes, where it looks like a number)",
    "a valid boolean": "true or false",
    "a valid array": "a list",
    "an object": "keys and values",
    "valid ": "",
}
"""Plain words for pydantic's, replaced in this order."""


def explain(error: ValidationError, raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return, for every problem, the dotted key and a sentence.

    raw: the run file's values, which the error is about. The key is empty for a problem between
    sections. These are looked at only if every value is right by itself.
    """
    problems = error.errors(include_url=False)
    # Misspelt keys first: what they leave missing is not told.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    told: dict[str, str] = {}
    for problem in problems:
        for key, sentence in _explain(problem, raw):
            if not (problem["type"] == "missing" and _is_misspelt(key, told)):
                told.setdefault(key or sentence, sentence)
    return [("" if key == sentence else key, sentence) for key, sentence in told.items()]


def _is_misspelt(key: str, told: Mapping[str, str]) -> bool:
    """Whether a key is missing because a sentence about another key has named it."""
    return any(f"did you mean {key}?" in sentence for sentence in told.values())


def _explain(problem: ErrorDetails, raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the key and a sentence of one problem; of a check between sections, all of its."""
    kind, loc = problem["type"], problem["loc"]
    if kind == "model_type" and loc[-2:-1] == ("optimizer",):  # then the last part is the kind
        loc = loc[:-1]
    key = ".".join(_keys(loc, raw))
    allowed = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not loc:  # checks between sections, whose sentences name the settings
        yield from (("", sentence) for sentence in allowed.splitlines())
        return
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
    elif kind == "missing" and len(loc) == 3 and _is_misspelt_network(loc, raw):
        known = [name for name, value in raw["networks"].items() if _is_network(value)]
        key = f"networks.{loc[1]}"
        is_half = bool(problem["input"].keys() & NETWORK_KEYS)
        lacks = f"no {loc[2]}" if is_half else "neither role nor model"
        names = ", ".join(known) or "none"
        sentence = f"{key} has {lacks}{nearest(str(loc[1]), known)} (networks: {names})"
    elif kind == "missing":
        sentence = f"{key} is missing{_allowed_of(key)}"
    elif kind == "union_tag_invalid":
        sentence = f"{key}.name: found {problem['ctx']['tag']}; allowed: 'sgd', 'adam', 'adamw'"
    elif loc[-1] == "[key]":
        sentence = f"{key} is no name for a network; allowed: up to 100 letters, digits, '-', '_'"
    elif kind == "value_error" and isinstance(problem["input"], dict) and loc[-1] not in TABLES:
        sentence = f"{key}: {allowed}"  # a check inside a section
    else:
        sentence = f"{key}: found {_short(problem['input'])}; allowed: {_plain(kind, allowed)}"
    yield key, sentence


def _plain(kind: str, allowed: str) -> str:
    """Return pydantic's words for what is allowed in plain words."""
    if kind in ("value_error", "assertion_error"):  # these are switokd's own sentences
        return allowed
    if kind == "string_pattern_mismatch":
        allowed = "letters, digits, '.', '_' and '-', a letter or digit first"
    for words, plain in PLAIN_WORDS.items():
        allowed = allowed.replace(words, plain)
    return allowed


def _allowed_of(key: str) -> str:
    """Say what a missing setting means."""
    parts = key.split(".")
    general = f"networks.NAME.{parts[-1]}" if parts[0] == "networks" and len(parts) == 3 else key
    meaning = (
        dict(known_settings())[general].description if general in dict(known_settings()) else ""
    )
    return f": {meaning[0].lower()}{meaning[1:].rstrip('.')}" if meaning else ""


def _is_network(value: Any) -> bool:
    """Whether a value below `networks` has what a network needs."""
    return isinstance(value, dict) and value.keys() >= NETWORK_KEYS


def _is_misspelt_network(loc: Sequence[str | int], raw: Mapping[str, Any]) -> bool:
    """Whether an incomplete network is rather a setting of another one, whose name is misspelt."""
    name, network = str(loc[1]), raw["networks"][loc[1]]
    known = [other for other, value in raw["networks"].items() if _is_network(value)]
    return not network.keys() & NETWORK_KEYS or bool(nearest(name, known))


def _keys(loc: Sequence[str | int], raw: Any) -> Iterator[str]:
    """Yield the keys of a pydantic location as the user wrote them.

    Pydantic's names of union members are left out.
    """
    for i, part in enumerate(loc):
        is_there = (isinstance(raw, dict) and part in raw) or isinstance(raw, list)
        if is_there:
            raw = raw[part]
        elif i < len(loc) - 1 or part == "[key]":
            continue
        yield str(part)


def _short(value: Any) -> str:
    """Return a value as JSON of at most 60 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nearest_key(key: str) -> str:
    """Return "; did you mean KEY?" for a close key of the same section, else of the whole file.

    Without a close key, list the keys of the section.
    """
    parts = key.split(".")
    network = parts[1] if parts[0] == "networks" and len(parts) > 2 else "NAME"
    pair = ".".join(parts[1:3]) if parts[0] == "pairs" and len(parts) > 3 else "TEACHER.STUDENT"
    settings = (
        k.replace("NAME", network).replace("TEACHER.STUDENT", pair) for k, _ in known_settings()
    )
    known = [k for k in settings if k != key]
    section, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    everywhere = {k.rpartition(".")[2]: k for k in reversed(known)}
    close = [siblings[leaf] for leaf in difflib.get_close_matches(leaf, siblings, n=1)]
    close += [everywhere[leaf] for leaf in difflib.get_close_matches(leaf, everywhere, 1, 0.8)]
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known keys here: {', '.join(siblings)}"
