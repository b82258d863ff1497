"""Draws docs/rooms.svg: the rooms of the package and which room imports which.

    .venv/bin/python docs/rooms.py

The arrows come from the imports in the code. An arrow is left out where a longer way of arrows
leads to the same room. Not covered: imports between the modules of one room.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PICTURE = REPOSITORY / "docs" / "rooms.svg"
ROOMS: Mapping[str, tuple[int, int, str]] = {
    "__main__": (0, 0, "python -m switokd"),
    "train": (0, 2, "what torchrun starts"),
    "cli": (1, 1, "one module per command"),
    "api": (2, 0, "train and distil from Python"),
    "worker": (3, 1, "one rank: wires all parts"),
    "deploying": (4, 0, "manifests for Kubernetes"),
    "runs": (4, 1, "run folder, record, comparison"),
    "export": (5, 0, "artefacts, predictions"),
    "planning": (5, 1, "which placement is fastest"),
    "training": (6, 1, "the step and its loop"),
    "coordination": (7, 2, "how a rank gets a decision"),
    "data": (8, 0, "images, order, targets"),
    "config": (9, 1, "the run file"),
    "models": (10, 0, "networks by name"),
    "runtime": (10, 1, "processes, devices, placement"),
    "services": (10, 3, "coordinator: adds up, decides"),
    "wire": (11, 2, "dataclasses to messages"),
    "distillation": (12, 1, "the paper"),
    "plugins": (13, 0, "the user's own modules"),
    "recipes": (13, 1, "run files that are included"),
    "v1": (13, 2, "generated messages"),
    "tracing": (13, 3, "traces for OpenTelemetry"),
    "errors": (14, 0, "errors and exit codes"),
}
"""By name of a room or top module: layer (0 is the top), column, and what it is."""
WIDTH, HEIGHT, COLUMN, ROW = 190, 36, 215, 66


def imports() -> dict[str, set[str]]:
    """By room, the other rooms that it imports from, also inside functions.

    ValueError if one of them is not in a lower layer.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for folder, prefix in (("switokd", ()), ("services", ("services",))):
        for file in sorted((REPOSITORY / folder).rglob("*.py")):
            path = (*prefix, *file.relative_to(REPOSITORY / folder).with_suffix("").parts)
            room = path[0]
            if room in ROOMS:
                found[room] |= set(_imported(file)) - {room}
    for room, others in found.items():
        for other in others:
            if ROOMS[other][0] <= ROOMS[room][0]:
                raise ValueError(f"{room} imports {other}, which is not below it")
    return found


def _imported(file: Path) -> Iterator[str]:
    """The rooms that a module imports from."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "switokd" and rest.partition(".")[0] in ROOMS:
                yield rest.partition(".")[0]


def reduced(arrows: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that no longer way of arrows stands for, from the top."""

    def below(room: str) -> set[str]:
        return arrows.get(room, set()).union(*(below(other) for other in arrows.get(room, ())))

    return [
        (room, other)
        for room in ROOMS
        for other in ROOMS
        if other in arrows.get(room, ())
        and not any(other in below(third) for third in arrows[room] - {other})
    ]


def picture() -> str:
    """The whole picture as SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {4 * COLUMN} {15 * ROW}" '
        'font-family="sans-serif" text-anchor="middle">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto">',
        '<path d="M0,0 L8,4 L0,8 z" fill="#5b6b82"/></marker></defs>',
        f'<rect width="{4 * COLUMN}" height="{15 * ROW}" fill="#ffffff"/>',
    ]
    for above, below in reduced(imports()):
        (row, column, _), (other_row, other_column, _) = ROOMS[above], ROOMS[below]
        start, end = (column * COLUMN + COLUMN // 2, row * ROW + 10 + HEIGHT), other_row * ROW + 9
        target = other_column * COLUMN + COLUMN // 2
        way = f"M{start[0]},{start[1]} L{target},{end}"
        if other_row - row > 4:  # beside the boxes between the two
            way = f"M{start[0] + WIDTH // 2},{start[1] - HEIGHT // 2} H{target} V{end}"
        lines.append(f'<path d="{way}" fill="none" stroke="#5b6b82" marker-end="url(#tip)"/>')
    for name, (row, column, text) in ROOMS.items():
        x, y = column * COLUMN + (COLUMN - WIDTH) // 2, row * ROW + 10
        middle, title = x + WIDTH // 2, _title(name)
        lines += [
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="#eaf1fb" '
            'stroke="#5b6b82"/>',
            f'<text x="{middle}" y="{y + 15}" font-size="13" font-weight="bold" fill="#1b2a41">'
            f"{title}</text>",
            f'<text x="{middle}" y="{y + 29}" font-size="11" fill="#1b2a41">{escape(text)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def _title(name: str) -> str:
    """A room's folder, or a top module's file."""
    if name == "services":
        return "services/coordinator/"
    return f"{name}/" if (REPOSITORY / "switokd" / name).is_dir() else f"{name}.py"


if __name__ == "__main__":
    PICTURE.write_text(picture())
