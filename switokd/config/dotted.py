"""Dotted keys of nested mappings, such as "networks.student.optimizer.lr".

Not covered: which keys a run file may have (`known_settings` in `config.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return all values of a nested mapping by dotted key, with `prefix` before the keys.

    An empty mapping is a value: its key is kept.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
