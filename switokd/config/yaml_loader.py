"""YAML as run files and settings use it: no duplicate keys, no values that nobody means."""

from __future__ import annotations

from typing import Any

import yaml

from switokd.errors import UsageError


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 5e-4 is a number, a key given twice is an error."""


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
