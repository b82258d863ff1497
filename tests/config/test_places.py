"""A mistake names the line of the run file, or the command line, on which its value was written.

Not covered: the sentences about the values (`test_run_file.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from switokd.api import train
from switokd.config.places import Places, RunFileText
from switokd.errors import UsageError
from tests.config.test_run_file import refusals

TEXT = """\
name: small
# A comment, and an anchor.
base: &base {model: wrn-10-1}

networks:
  big:
    role: teacher
    optimizer:
      lr: 0.1
    <<: *base
  little: {role: student,
    model: wrn-10-1}
observers: [tensorboard,
  mlflow]
"""


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("name", 1),
        ("networks", 5),
        ("networks.big", 6),
        ("networks.big.optimizer.lr", 9),
        ("networks.big.model", 3),
        ("networks.little.model", 12),
        ("observers.1", 14),
        ("observers.2", None),
        ("networks.big.optimizer.lr.x", None),
        ("seed", None),
    ],
)
def test_line_of_a_key(key: str, line: int | None) -> None:
    file = RunFileText("small.yaml", TEXT)
    assert file.line_of(key) == line
    assert file.at(key) == ("small.yaml" if line is None else f"small.yaml:{line}")


def test_line_of_a_networks_template() -> None:
    text = "topology: 2T1S\nteacher:\n  model: wrn\nstudent: {model: x}\n"
    text += "networks: {student: {lr: 1}}\n"
    file = RunFileText("t.yaml", text)
    assert file.line_of("networks.teacher2.model") == 3
    assert file.line_of("networks.student.model") == 4
    assert file.line_of("networks.student.lr") == 5


@pytest.mark.parametrize(
    ("key", "settings", "place"),
    [
        ("networks.big.optimizer.lr", ["seed=1"], "small.yaml:9"),
        (
            "networks.big.optimizer.lr",
            ["networks.big.optimizer.lr=x", "seed=1"],
            "settings, networks",
        ),
        ("networks.big.optimizer.lr", ["networks.big.optimizer={lr: x}"], "settings, networks.big"),
        (
            "networks.big.optimizer",
            ["networks.big.optimizer.lr=x"],
            "small.yaml:8 with networks.big",
        ),
        ("networks.new", ["networks.new.model=x"], "settings, networks.new.model=x"),
        ("", ["seed=1"], "small.yaml"),
    ],
)
def test_place_of_a_value_that_file_and_settings_give(
    key: str, settings: list[str], place: str
) -> None:
    places = Places(RunFileText("small.yaml", TEXT), settings, "settings")
    assert places.of(key, "a sentence").startswith(place)


def test_every_mistake_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(
        "name: small\nnetworks:\n  t: {role: teacher, model: wrn-10-2}\n"
        "  s:\n    role: pupil\n    model: wrn-10-1\nschedule:\n  epochs: 0\n  epohs: 3\n"
    )
    found = refusals(path, "seed=-1")
    places = {line.partition(": ")[0] for line in found}
    assert places == {f"{path}:5", f"{path}:8", f"{path}:9", "command line"}


def test_a_mistake_between_sections_names_the_line_of_the_setting_that_it_is_about(
    tmp_path: Path,
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(
        "name: small\nnetworks:\n  t: {role: teacher, model: wrn-10-2}\n"
        "  s: {role: student, model: wrn-10-1}\npairs:\n  t:\n    x: {enabled: false}\n"
    )
    (line,) = [line for line in refusals(path) if "pairs.t.x" in line]
    assert line.startswith(f"{path}:7: pairs.t.x: no student")


def test_settings_from_python_are_not_called_a_command_line() -> None:
    with pytest.raises(UsageError, match=r"^settings: schedule.epochs: found 0"):
        train("digits-1t1s", {"schedule.epochs": 0})
