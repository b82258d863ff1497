"""The page reference/contract.md: services, messages and enums, from the comments of proto/.

mkdocs calls `on_page_markdown` for every page. buf compiles the contract with its comments.
No generator in the registries writes Markdown that fits into a page of mkdocs.

Not covered: order of messages, status codes and compatibility, which the page itself has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
PLACE = "<!-- contract -->"
"""Where the contract goes in the page."""
SERVICE, MESSAGE, ENUM = 6, 4, 5
"""Numbers of the fields of a file descriptor, of which a comment's path consists."""
METHOD = FIELD = VALUE = 2
NESTED_ENUM = 4
WORDS = {"TYPE_DOUBLE": "double", "TYPE_INT64": "int64", "TYPE_INT32": "int32"}
WORDS |= {"TYPE_STRING": "string", "TYPE_BYTES": "bytes", "TYPE_BOOL": "bool"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page, with the contract in its place."""
    return markdown.replace(PLACE, "\n".join(contract())) if PLACE in markdown else markdown


@cache
def file_descriptor() -> dict[str, Any]:
    """The descriptor of coordinator.proto as JSON, with comments. CalledProcessError by buf."""
    buf = Path(sys.executable).with_name("buf")
    command = [str(buf), "build", "proto", "-o", "-#format=json"]
    built = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    (found,) = (f for f in json.loads(built.stdout)["file"] if "coordinator" in f["name"])
    return dict(found)


def comment(*path: int) -> str:
    """The comment before a part of the contract, on one line; empty if it has none."""
    for place in file_descriptor()["sourceCodeInfo"]["location"]:
        if tuple(place.get("path", ())) == path:
            return " ".join(str(place.get("leadingComments", "")).split()).replace("|", "\\|")
    return ""


def contract() -> Iterator[str]:
    """All services, messages and enums, in the order of the file, as lines of Markdown."""
    file = file_descriptor()
    for number, service in enumerate(file["service"]):
        yield from ("", f"### {service['name']}", "", "| call | request | response | meaning |")
        yield "| --- | --- | --- | --- |"
        for i, method in enumerate(service["method"]):
            request, response = (link(method[key]) for key in ("inputType", "outputType"))
            request = f"stream of {request}" if method.get("clientStreaming") else request
            response = f"stream of {response}" if method.get("serverStreaming") else response
            meaning = comment(SERVICE, number, METHOD, i)
            yield f"| `{method['name']}` | {request} | {response} | {meaning} |"
    for number, message in enumerate(file["messageType"]):
        yield from ("", f"### {message['name']}", "", comment(MESSAGE, number), "")
        yield from fields(number, message)
        for i, enum in enumerate(message.get("enumType", ())):
            yield from ("", f"#### {enum['name']}", "")
            yield from values(enum, MESSAGE, number, NESTED_ENUM, i)
    for number, enum in enumerate(file["enumType"]):
        yield from ("", f"### {enum['name']}", "")
        yield from values(enum, ENUM, number)


def values(enum: dict[str, Any], *path: int) -> Iterator[str]:
    """The comment of an enum and the table of its values. path: of the enum in the file."""
    yield from (comment(*path), "", "| value | number | meaning |", "| --- | --- | --- |")
    for i, value in enumerate(enum["value"]):
        yield f"| `{value['name']}` | {value.get('number', 0)} | {comment(*path, VALUE, i)} |"


def fields(number: int, message: dict[str, Any]) -> Iterator[str]:
    """The table of a message's fields."""
    if not message.get("field"):
        yield "No fields."
        return
    yield from ("| field | number | type | meaning |", "| --- | --- | --- | --- |")
    for i, field in enumerate(message["field"]):
        meaning = comment(MESSAGE, number, FIELD, i)
        yield f"| `{field['name']}` | {field['number']} | {type_of(field, message)} | {meaning} |"


def type_of(field: dict[str, Any], message: dict[str, Any]) -> str:
    """The type of a field in the words of proto3, with links to messages and enums."""
    name = WORDS.get(field["type"]) or link(field["typeName"])
    if field.get("label") == "LABEL_REPEATED":
        return f"repeated {name}"
    if field.get("proto3Optional"):
        return f"optional {name}"
    if "oneofIndex" in field:
        return f"{name}, one of `{message['oneofDecl'][field['oneofIndex']]['name']}`"
    return str(name)


def link(type_name: str) -> str:
    """A link to the section of a message or enum: ".switokd.v1.Pair"."""
    name = type_name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})"
