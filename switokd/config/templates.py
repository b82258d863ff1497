"""Networks from templates: `topology: 3T2S` with one template for teachers, one for students.

    topology: 3T2S
    teacher: {model: wrn-16-2}
    student: {model: wrn-10-1, optimizer: {lr: 0.05}}
    networks: {teacher3: {model: mobilenet}}      # differences from the template, if any

stands for the networks teacher1, teacher2, teacher3, student1 and student2. A single teacher or
student has no number. The effective configuration names all networks and has no templates.

Not covered: checking the templates' settings; the networks made from them are checked.
"""

from __future__ import annotations

import re
from typing import Any

KEYS = ("topology", "teacher", "student")


def spell_out(raw: Any) -> Any:
    """Replace the templates in a run file's raw mapping by networks.

    A mapping without templates is returned unchanged. ValueError for an invalid topology, template
    or network.
    """
    if not isinstance(raw, dict) or not any(raw.get(key) is not None for key in KEYS):
        return raw
    rest = {key: value for key, value in raw.items() if key not in KEYS}
    match = re.fullmatch(r"([1-9]\d?)T([1-9]\d?)S", str(raw.get("topology")))
    if not match:
        raise ValueError(
            f"topology: found {raw.get('topology')!r}; allowed: such as 2T1S (two teachers, one "
            "student); teacher and student are the templates of its networks"
        )
    named = rest.get("networks") or {}
    if not isinstance(named, dict):
        raise ValueError(
            f"networks: found {named!r}; allowed: differences from the templates by network, such "
            "as {teacher: {model: wrn-16-2}}"
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
    """Merge a network's own settings into the template, section by section.

    An optimizer of another kind has other settings: it replaces the template's.
    """
    if not isinstance(own, dict):
        return own
    merged = dict(template)
    for key, value in own.items():
        inherited = merged.get(key)
        merged[key] = value
        if isinstance(value, dict) and isinstance(inherited, dict):
            kind = inherited.get("name")
            if value.get("name", kind) == kind:
                merged[key] = {**inherited, **value}
    return merged
