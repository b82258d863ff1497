"""Topologies by their name: `topology: 3T2S` with a template for the teachers and the students.

    topology: 3T2S
    teacher: {model: wrn-16-2}
    student: {model: wrn-10-1, optimizer: {lr: 0.05}}
    networks: {teacher3: {model: mobilenet}}      # what differs, if anything does

stands for networks teacher1, teacher2, teacher3, student1, student2 (teacher or student where there
is one of a kind). The effective configuration has them spelled out.

Not covered: checking what the templates hold, which is done on the networks made of them.
"""

from __future__ import annotations

import re
from typing import Any

KEYS = ("topology", "teacher", "student")


def spell_out(raw: Any) -> Any:
    """A run file's raw mapping with networks for its topology; ValueError if that cannot be."""
    if not isinstance(raw, dict) or not any(raw.get(key) is not None for key in KEYS):
        return raw
    rest = {key: value for key, value in raw.items() if key not in KEYS}
    match = re.fullmatch(r"([1-9]\d?)T([1-9]\d?)S", str(raw.get("topology")))
    if not match:
        raise ValueError(
            f"topology: such as 2T1S (teachers, students), found {raw.get('topology')!r}; teacher "
            "and student are the templates of its networks"
        )
    named = rest.get("networks") or {}
    if not isinstance(named, dict):
        raise ValueError(
            "networks: by name what differs from the templates, such as {teacher: {model: "
            f"wrn-16-2}}}}, found {named!r}"
        )
    made: dict[str, Any] = {}
    for role, count in (("teacher", int(match[1])), ("student", int(match[2]))):
        template = raw.get(role) or {}
        if not isinstance(template, dict):
            raise ValueError(f"{role}: a network's settings, such as {{model: wrn-16-2}}")
        for name in [role] if count == 1 else [f"{role}{i + 1}" for i in range(count)]:
            made[name] = _merge({**template, "role": role}, named.get(name) or {})
    if extra := [name for name in named if name not in made]:
        raise ValueError(
            f"networks.{extra[0]}: topology {match[0]} has the networks {', '.join(made)}"
        )
    return {**rest, "networks": made}


def _merge(template: dict[str, Any], own: Any) -> Any:
    """The template with what a network says of its own on top, section by section."""
    if not isinstance(own, dict):
        return own
    merged = dict(template)
    for key, value in own.items():
        below = merged.get(key)
        merged[key] = value
        if isinstance(value, dict) and isinstance(below, dict):
            kind = below.get("name")  # an optimizer of another kind has other settings
            if value.get("name", kind) == kind:
                merged[key] = {**below, **value}
    return merged
