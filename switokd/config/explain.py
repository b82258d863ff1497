"""Explain a pydantic error of a run file in one line: key, value, allowed values, nearest key.

Not covered: errors before pydantic sees the values (`yaml_loader.py`, `templates.py`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from switokd.config.config import known_settings
from switokd.config.optimizers import SGD, Adam, AdamW
from switokd.errors import nearest

OPTIMIZER_KEYS = {*SGD.model_fields, *Adam.model_fields, *AdamW.model_fields}
PLAIN_WORDS = {
    "a valid integer": "a whole number",
    "a valid array": "a list",
    "an object": "keys and values",
    "valid ": "",
}
"""Plain words for pydantic's, replaced in this order."""


def explain(error: ValidationError, raw: Mapping[str, Any]) -> tuple[str, str]:
    """Return the dotted key of the first problem, and a sentence about the problem.

    raw: the run file's values, which the error is about. The key is empty for a problem between
    sections.
    """
    problems = error.errors(include_url=False)
    # A misspelt key gives two errors, unknown and missing: the first one helps more.
    problem, *others = sorted(problems, key=lambda p: p["type"] != "extra_forbidden")
    more = f" (and {len(others)} more)" if others else ""
    kind, loc = problem["type"], problem["loc"]
    if kind == "model_type" and loc[-2:-1] == ("optimizer",):  # then the last part is the kind
        loc = loc[:-1]
    key = ".".join(_keys(loc, raw))
    allowed = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not loc:  # a check between sections, whose sentence names the settings
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
        known = [name for name, value in raw["networks"].items() if _is_network(value)]
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
        if kind not in ("value_error", "assertion_error"):  # these are switokd's own sentences
            for words, plain in PLAIN_WORDS.items():
                allowed = allowed.replace(words, plain)
        sentence = f"{key}: found {_short(problem['input'])}; allowed: {allowed}"
    return key, sentence + more


def _is_network(value: Any) -> bool:
    """Whether a value below `networks` is meant as a network.

    Otherwise it is a setting of another network whose name is misspelt.
    """
    return isinstance(value, dict) and ("role" in value or "model" in value)


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
