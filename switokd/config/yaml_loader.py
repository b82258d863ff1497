"""YAML as run files and settings use it: values by the core schema of YAML 1.2, and text as keys.

PyYAML reads YAML 1.1, where 010 is eight, 1:30 is ninety, and `no` and `on` are truth values. Here
a plain value is null, true or false, a whole number (10, 0o17, 0x1F), a number (5e-4, .5, .inf,
.nan), or text. A key is the text that is written, and a duplicate key is an error. Anchors, and
`<<` to merge mappings, are read as PyYAML reads them.

What is written is quoted wherever a reader of either version would take text for another value.

ruamel.yaml (0.19 was tried) reads YAML 1.2, but takes 1_000 and 0b1 for numbers, and 2020-01-01 for
a date. It would need tables of its own as well.

Not covered: the meaning of the values (`run_file.py`); tags other than those of JSON's values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import yaml

from switokd.errors import UsageError

UNUSABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that no file has in its name, or that cannot be written as UTF-8."""

MOST_VALUES = 1_000_000
"""Values in a file. A few lines of anchors in anchors can stand for more than any memory holds."""

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_WHOLE = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
_PLAIN = {
    f"{_TAG}null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    f"{_TAG}bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    f"{_TAG}int": (_WHOLE, list("-+0123456789")),
    f"{_TAG}float": (
        rf"{_NUMBER}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    _MERGE: ("<<", ["<"]),
}
"""By tag: which plain text has it, and the characters with which such text begins."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with the values that the module names and no others."""

    yaml_implicit_resolvers = {}  # noqa: RUF012, as in PyYAML
    yaml_constructors = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes what YAML 1.1 resolves, and what YAML 1.2 resolves."""


for _tag, (_text, _first) in _PLAIN.items():
    _form = re.compile(rf"(?:{_text})\Z")
    _Loader.add_implicit_resolver(_tag, _form, _first)
    _Dumper.add_implicit_resolver(_tag, _form, _first)
# PyYAML leaves out these truth values of YAML 1.1.
_Dumper.add_implicit_resolver(f"{_TAG}bool", re.compile(r"[yYnN]\Z"), list("yYnN"))


def _problem(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _check_characters(node: yaml.Node) -> None:
    """Refuse characters that only an escape such as "\\0" can write."""
    if isinstance(node, yaml.ScalarNode) and (found := UNUSABLE.search(node.value)):
        raise _problem(node, f"text cannot have the character U+{ord(found[0]):04X}")


def _text_of(node: yaml.Node, form: str, kind: str) -> str:
    """Return a scalar's text; MarkedYAMLError if a tag such as !!int stands before other text."""
    if not isinstance(node, yaml.ScalarNode) or not re.fullmatch(form, node.value):
        raise _problem(node, f"{kind} expected")
    return str(node.value)


def _null(loader: _Loader, node: yaml.Node) -> None:
    _text_of(node, _PLAIN[f"{_TAG}null"][0], "null")


def _truth(loader: _Loader, node: yaml.Node) -> bool:
    return _text_of(node, _PLAIN[f"{_TAG}bool"][0], "true or false").lower() == "true"


def _whole(loader: _Loader, node: yaml.Node) -> int:
    text = _text_of(node, _WHOLE, "a whole number")
    try:
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    except ValueError:  # Python limits the number of digits
        raise _problem(node, "a number has too many digits") from None


def _number(loader: _Loader, node: yaml.Node) -> float:
    text = _text_of(node, _PLAIN[f"{_TAG}float"][0], "a number")
    number = float(re.sub(r"\.(?=[iInN])", "", text))  # .inf and .nan
    if math.isinf(number) and text[-1] not in "fF":
        raise _problem(node, f"the number {text} is too large")
    return number


def _plain_text(loader: _Loader, node: yaml.Node) -> str:
    _check_characters(node)
    return _text_of(node, r"(?s:.*)", "text")


def _list(loader: _Loader, node: yaml.Node) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode):
        raise _problem(node, "a list expected")
    return [loader.construct_object(item, deep=True) for item in node.value]


def _mapping(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    """Construct a mapping with text as keys; MarkedYAMLError for a duplicate or any other key."""
    if not isinstance(node, yaml.MappingNode):
        raise _problem(node, "keys and values expected")
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _problem(key, "a list or a mapping cannot be a key")
        _check_characters(key)
        if key.value in seen:
            raise _problem(key, f"key {key.value!r} is there twice")
        seen.add(key.value)
    loader.flatten_mapping(node)
    return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}


def _unknown(loader: _Loader, node: yaml.Node) -> None:
    tag = node.tag.replace(_TAG, "!!")
    raise _problem(node, f"the tag {tag} is not allowed; write a plain or a quoted value")


_CONSTRUCTORS: dict[str, Callable[[_Loader, Any], Any]] = {
    "null": _null,
    "bool": _truth,
    "int": _whole,
    "float": _number,
    "str": _plain_text,
    "seq": _list,
    "map": _mapping,
}
for _tag, _construct in _CONSTRUCTORS.items():
    _Loader.add_constructor(f"{_TAG}{_tag}", _construct)
_Loader.add_constructor(None, _unknown)


def _quoted(dumper: _Dumper, text: str) -> yaml.Node:
    """Represent text; text of several lines in double quotes, which keep it in one line."""
    style = '"' if text.splitlines() not in ([], [text]) else None
    return dumper.represent_scalar(f"{_TAG}str", text, style)


_Dumper.add_representer(str, _quoted)


def _size(value: Any, known: dict[int, int]) -> int:
    """Count the values in a list or mapping, those of an anchor each time that it is used.

    known: sizes of lists and mappings by their id.
    """
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in known:
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(item, known) for item in items)
    return known[id(value)]


def parse_yaml(text: str, where: str, is_file: bool = False) -> Any:
    """Parse YAML text; UsageError that begins with `where` if the text is not valid YAML.

    is_file: whether the error names the line as well.
    """
    try:
        value = yaml.load(text, _Loader)
        if _size(value, {}) > MOST_VALUES:
            raise UsageError(f"{where}: its anchors expand to more than {MOST_VALUES} values")
        return value
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and is_file else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{where}{line}: not valid YAML: {problem}") from None
    except RecursionError:
        raise UsageError(f"{where}: not valid YAML: it is nested too deeply") from None


def parse_number(text: str) -> float | None:
    """Parse a finite number of a command's option as in a run file; None for anything else."""
    try:
        value = parse_yaml(text, "")
    except UsageError:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < math.inf else None


def dump_yaml(value: Any) -> str:
    """Return a mapping as the text of a YAML file; reading it gives an equal mapping."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def in_one_line(value: Any) -> str:
    """Return a value as YAML in one line, for a setting of a command."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
    )
    return text.removesuffix("...\n").rstrip("\n")
