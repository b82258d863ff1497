"""docs/design.md says what the code is: its layers, its functions, its picture."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "docs"))
import hooks  # type: ignore[import-not-found]
import rooms  # type: ignore[import-not-found]

DESIGN = (REPOSITORY / "docs" / "design.md").read_text()


def layers_of_the_page() -> list[set[str]]:
    """The rooms of each layer, from the top, as the table of design.md has them."""
    layers: dict[int, set[str]] = {}
    for number, names in re.findall(r"^\| (\d+) \| (.+?) \|", DESIGN, re.MULTILINE):
        for name in re.findall("`(.+?)`", names):
            room = name.rstrip("/").removesuffix(".py")
            layers.setdefault(int(number), set()).add(room)
    return [layers[number] for number in sorted(layers)]


def test_the_layers_are_those_that_make_check_holds() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    contract = re.search(r'^type = "layers"$.*?^layers = \[(.*?)^\]', project, re.M | re.S)
    assert contract, "the contract of import-linter"
    lines = re.findall(r'^ *"(.+?)",$', contract[1], re.MULTILINE)
    assert layers_of_the_page() == [set(re.split(r" [|:] ", line)) for line in lines]


def test_the_picture_shows_the_layers_and_is_that_of_the_code() -> None:
    drawn: dict[int, set[str]] = {}
    for room, (layer, _, _) in rooms.ROOMS.items():
        drawn.setdefault(layer, set()).add(room)
    assert [drawn[layer] for layer in sorted(drawn)] == layers_of_the_page()
    again = "draw it again: .venv/bin/python docs/rooms.py"
    assert rooms.PICTURE.read_text() == rooms.picture(), again


def functions() -> Iterator[tuple[str, str]]:
    """File and name of each function that the ways through the code mention."""
    for row in re.findall(r"^\|[^|]+\| (`\w+/?.+?) \|$", DESIGN, re.MULTILINE):
        yield from re.findall(r"`([\w/]+\.py)` `([\w.]+)`", row)
    yield from re.findall(r"`([\w/]+\.py)` `([\w.]+)`", DESIGN)


@pytest.mark.parametrize(("file", "name"), sorted(set(functions())))
def test_a_function_of_the_ways_exists(file: str, name: str) -> None:
    path = REPOSITORY / ("" if file.startswith("services/") else "switokd") / file
    names: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.append(node.name)
        if isinstance(node, ast.ClassDef):
            parts = (part for part in node.body if isinstance(part, ast.FunctionDef))
            names += [f"{node.name}.{part.name}" for part in parts]
    assert name in names


def test_four_ways_are_walked() -> None:
    assert len(set(functions())) > 30
    assert len(re.findall("^## The way of", DESIGN, re.MULTILINE)) == 4


def test_the_page_of_settings_has_each_with_its_default_and_what_is_allowed() -> None:
    page = hooks.on_page_markdown((REPOSITORY / "docs" / "configuration.md").read_text())
    assert hooks.PLACE not in page
    for row in (
        "| `data.batch_size` | `64` | integer ≥ 2 |",
        "| `networks.NAME.role` | required | `teacher`, `student` |",
        "| `networks.NAME.optimizer.betas` | `[0.9, 0.999]` | list of 2 values, each: number ≥ 0 ",
        "| `schedule.max_steps` | `null` | integer ≥ 1, `null` |",
        "| `pairs.TEACHER.STUDENT.enabled` | `true` | `true`, `false` |",
    ):
        assert row in page
    listed = set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE))
    sections = {"auto", "data", "distillation", "schedule", "compute", "coordinator", "networks"}
    sections |= {"checkpoint", "coordinator.tls", "tracking"}
    known = {key for key, _ in hooks.known_settings()}
    assert known - listed == sections | {"pairs", "networks.NAME.optimizer"}
    assert set(hooks.OWN_WORDS) <= known


def test_the_sites_scripts_are_not_part_of_the_site() -> None:
    excluded = (REPOSITORY / "mkdocs.yml").read_text().partition("exclude_docs: |")[2]
    for script in Path(REPOSITORY / "docs").glob("*.py"):
        assert f"  {script.name}\n" in excluded
