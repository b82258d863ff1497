"""Tables of all settings for the page configuration.md, made from the settings themselves.

mkdocs calls `on_page_markdown` for every page. Not covered: the text around the tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from switokd.config.base import Section
from switokd.config.config import Config, known_settings
from switokd.config.optimizers import SGD, Adam, AdamW
from switokd.config.sections import Network, PairSettings
from switokd.distillation.semantics import SEMANTICS

PLACE = "<!-- settings -->"
"""Where the tables go in the page."""
OPTIMIZERS = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
INNER = {"networks": ("NAME.", Network), "pairs": ("TEACHER.STUDENT.", PairSettings)}
"""Mappings whose keys are names: what stands for a name, and the section below it."""
OWN_WORDS = {
    "placement": "`dedicated`, `replicated`, `auto`, a table of networks and ranks",
    "auto.paused": "number from 0 to 1, mapping of teachers to numbers, `null`",
    "distillation.semantics": ", ".join(f"`{name}`" for name in SEMANTICS),
    "coordinator.address": "`auto`, `off`, `HOST:PORT`, `HOST:PORT,HOST:PORT`",
}
"""Values that a validator allows, which the types of the settings do not show."""
TYPES = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "`true`, `false`",
    "null": "`null`",
    "object": "mapping",
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page, with the tables in their place."""
    return markdown.replace(PLACE, "\n".join(tables())) if PLACE in markdown else markdown


def tables() -> Iterator[str]:
    """One heading and table per section of a run file, as lines of Markdown."""
    yield from table("The run", Config, "")
    for key, field in known_settings():
        if key.endswith(".optimizer"):
            for name, section in OPTIMIZERS.items():
                yield from table(f"{key}, {name}", section, f"{key}.")
        elif key in INNER:
            name, section = INNER[key]
            yield from table(f"{key}.{name}".rstrip("."), section, f"{key}.{name}")
        elif isinstance(field.default, Section):
            yield from table(key, type(field.default), f"{key}.")


def table(title: str, section: type[Section], prefix: str) -> Iterator[str]:
    """A section's heading, sentence and settings; sections within it have tables of their own."""
    yield from ("", f"### {title}", "", one_line(section.__doc__), "")
    yield "| key | default | allowed | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in section.model_fields.items():
        key = prefix + name
        if isinstance(field.default, Section) or key in INNER:
            continue
        cells = (f"`{key}`", default(field), allowed(key, field), one_line(field.description))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def one_line(text: str | None) -> str:
    """A description on one line."""
    return " ".join((text or "").split())


def default(field: FieldInfo) -> str:
    """The default as YAML would have it; a setting without one is required."""
    if field.default is PydanticUndefined:
        return "required"
    return f"`{json.dumps(field.default)}`"


def allowed(key: str, field: FieldInfo) -> str:
    """The values that a setting takes."""
    if key in OWN_WORDS:
        return OWN_WORDS[key]
    kind: Any = field.annotation
    if field.metadata:
        kind = Annotated[(kind, *field.metadata)]
    return ", ".join(words(TypeAdapter(kind).json_schema()))


def words(schema: dict[str, Any]) -> list[str]:
    """What a JSON schema allows, one alternative after the other."""
    if "anyOf" in schema:
        return [word for option in schema["anyOf"] for word in words(option)]
    if "const" in schema or "enum" in schema:
        return [f"`{value}`" for value in schema.get("enum", [schema.get("const")])]
    if schema["type"] == "array":
        pair = schema.get("prefixItems")
        item = " or ".join(words(pair[0] if pair else schema["items"]))
        return [f"list of {len(pair)} values, each: {item}" if pair else f"list of: {item}"]
    bounds = [f"{sign} {schema[bound]}" for bound, sign in BOUNDS.items() if bound in schema]
    return [f"{TYPES[schema['type']]} {' and '.join(bounds)}".strip()]
