"""YAML as run files and settings use it: strict about keys, tolerant about numbers.

Differs from plain YAML 1.1 in three points: 5e-4 is a number, a duplicate key is an error, and a
key must be text or a number (`on: 3` would make the key `True`).

Not covered: the meaning of the values (`run_file.py`).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from switokd.errors import UsageError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the differences that the module names."""


def _strict_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """Construct a mapping; MarkedYAMLError for a duplicate key or a key of a wrong type."""
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


_Loader.add_constructor("tag:yaml.org,2002:map", _strict_mapping)
# YAML 1.1 asks for a dot and a signed exponent: PyYAML reads 5e-4 as text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text; UsageError that begins with `where` if the text is not valid YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{where}{line}: not valid YAML: {problem}") from None
