"""Settings of runs that differ from their defaults, and from run to run.

Not covered: what the settings mean (`config/sections.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from switokd.config.base import Section
from switokd.config.config import Config, known_settings
from switokd.config.dotted import flatten
from switokd.config.optimizers import SGD, Adam, AdamW

OPTIMIZERS: dict[str, type[Section]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}


def effective(config: Config) -> dict[str, Any]:
    """Return all settings of a run by dotted key, as a run file would have them."""
    return flatten(json.loads(config.model_dump_json()))


def changed(config: Config) -> dict[str, Any]:
    """Return the settings that are not their defaults, and those that have none."""
    fields = dict(known_settings())
    return {
        key: value
        for key, value in effective(config).items()
        if (field := _field(config, key, fields)) is None or value != _default(field)
    }


def between(configs: Sequence[Config]) -> list[str]:
    """Return the dotted keys whose settings are not the same in all configurations.

    Of a network that not all runs have, those that are not defaults.
    """
    settings = [effective(config) for config in configs]
    keys = dict.fromkeys(key for each in settings for key in each)
    not_defaults = {key for config in configs for key in changed(config)}
    return [
        key
        for key in keys
        if (
            any(s[key] != settings[0][key] for s in settings)
            if all(key in s for s in settings)
            else key in not_defaults
        )
    ]


def _field(config: Config, key: str, fields: dict[str, FieldInfo]) -> FieldInfo | None:
    """Return the field of a setting; None if the key is below a mapping of the user's own."""
    parts = key.split(".")
    if parts[0] == "networks" and len(parts) == 4 and parts[2] == "optimizer":
        kind = OPTIMIZERS[config.networks[parts[1]].optimizer.name]
        return kind.model_fields.get(parts[3])
    if parts[0] == "networks" and len(parts) > 2:
        parts[1] = "NAME"
    elif parts[0] == "pairs" and len(parts) > 3:
        parts[1:3] = ["TEACHER", "STUDENT"]
    return fields.get(".".join(parts))


def _default(field: FieldInfo) -> Any:
    """Return a field's default as JSON has it."""
    if field.default is PydanticUndefined:
        return PydanticUndefined
    return json.loads(json.dumps(field.default, default=lambda section: section.model_dump()))
