"""Where a value was written: the line of the run file, or the setting on the command line.

A file is read a second time for its lines, and only if it has a mistake.

Not covered: what is wrong with the value (`explain.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

KEY = re.compile(r"(?:unknown key )?([A-Za-z_][\w-]*(?:\.[\w-]+)*)")
"""The dotted key that a sentence about settings begins with."""

ROLES = ("teacher", "student")


@dataclass(frozen=True)
class RunFileText:
    """A run file's name and text; no text: the values come from elsewhere."""

    name: str
    text: str = ""

    def line_of(self, key: str) -> int | None:
        """Return the line, from 1, on which a dotted key stands; None if it is not in the file.

        A network that a template makes has the template's keys too.
        """
        parts = key.split(".")
        keys = [parts]
        if parts[0] == "networks" and len(parts) > 1:
            keys += [[role, *parts[2:]] for role in ROLES if parts[1].startswith(role)]
        node = yaml.compose(self.text, yaml.SafeLoader) if self.text else None
        return next((line for each in keys if (line := _line(node, each)) is not None), None)

    def at(self, key: str) -> str:
        """Return FILE:LINE of a key; only the file if the key is not there."""
        line = self.line_of(key) if key else None
        return self.name if line is None else f"{self.name}:{line}"


def _line(node: yaml.Node | None, parts: Sequence[str]) -> int | None:
    """Return the line on which the last of the keys stands, each below the one before."""
    line = None
    for part in parts:
        if isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
            continue
        found = _entry(node, part)
        if found is None:
            return None
        key, node = found
        line = key.start_mark.line + 1
    return line


def _entry(node: yaml.Node | None, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    """Return a mapping's key and value, also one that << merges; None if it has no such key."""
    if not isinstance(node, yaml.MappingNode):
        return None
    for name, value in node.value:
        if name.value == key:
            return name, value
    for name, value in node.value:
        merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for each in merged if name.value == "<<" else ():
            if each is not node and (found := _entry(each, key)):
                return found
    return None


@dataclass(frozen=True)
class Places:
    """Names the places of a run's values. given: where `settings` were given, in messages."""

    file: RunFileText
    settings: Sequence[str]
    given: str

    def of(self, key: str, sentence: str) -> str:
        """Return where the value of a dotted key was written, the last time.

        key: empty for a problem between sections; then that with which the sentence begins.
        """
        if not key and (begin := KEY.match(sentence)):
            key = begin[1]
        holds = [s for s in self.settings if _is_in(key, s.partition("=")[0])]
        if holds:  # the sentence itself says key and value, if the setting is of this key
            is_same = holds[-1].partition("=")[0] == key and sentence.startswith(key)
            return self.given if is_same else f"{self.given}, {holds[-1]}"
        inside = [s for s in self.settings if _is_in(s.partition("=")[0], key)]
        if inside and (not self.file.text or self.file.line_of(key) is None):
            return f"{self.given}, {inside[-1]}"
        return f"{self.file.at(key)} with {inside[-1]}" if inside else self.file.at(key)


def _is_in(key: str, section: str) -> bool:
    """Whether a dotted key is the section, or below it."""
    return key == section or key.startswith(f"{section}.")
