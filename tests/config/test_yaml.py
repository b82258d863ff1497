"""Values as a run file writes them: read by YAML 1.2, and written so that YAML 1.1 agrees.

Not covered: which values a setting allows (`test_run_file.py`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from switokd.config.run_file import load
from switokd.config.yaml_loader import dump_yaml, in_one_line, parse_number, parse_yaml
from switokd.errors import UsageError

READ: dict[str, object] = {
    "010": 10,
    "08": 8,
    "+1": 1,
    "-0": 0,
    "0x1F": 31,
    "0o17": 15,
    "5e-4": 5e-4,
    "1e3": 1000.0,
    "1.": 1.0,
    ".5": 0.5,
    "-.5E+2": -50.0,
    "010.5": 10.5,
    ".inf": math.inf,
    "-.INF": -math.inf,
    "+.inf": math.inf,
    "true": True,
    "TRUE": True,
    "False": False,
    "~": None,
    "null": None,
    "": None,
    "{on: 1, 010: 2, true: 3, ~: 4, 1.50: 5, =: 6}": {
        "on": 1,
        "010": 2,
        "true": 3,
        "~": 4,
        "1.50": 5,
        "=": 6,
    },
    "{a: &x {b: 1}, c: {<<: *x, d: 2}}": {"a": {"b": 1}, "c": {"b": 1, "d": 2}},
    "!!str 010": "010",
    "!!float 3": 3.0,
}
TEXT = (
    *("1:30", "1:30:15.5", "1_000", "1_0.5", "0b1", "0X1F", "-0x1", "+0o7", "2020-01-01"),
    *("no", "on", "off", "yes", "y", "N", "=", "12e", "1.5.2", "+.nan", "tRUE", "१२"),
)
QUOTED = (
    *(*TEXT, *READ, "0_1.5", "12e03", "a\nb", "a\n", "\x7f", "\u2028", "a: b", "#", " x", "'", '"'),
    *("-", "?", "&a", "*a", "%a", "@a", "`a", "!a", "[", "{", "Größe", "<<", ".nan"),
)


@pytest.mark.parametrize("text", READ)
def test_plain_value_is_read_by_yaml_1_2(text: str) -> None:
    value = parse_yaml(text, "here")
    assert (value, type(value)) == (READ[text], type(READ[text]))


def test_nan_is_read() -> None:
    assert math.isnan(parse_yaml(".nan", "here"))


@pytest.mark.parametrize("text", TEXT)
def test_other_plain_value_is_text(text: str) -> None:
    assert parse_yaml(text, "here") == text


ANCHORS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
"""Ten lines that stand for 2 * 10**9 values."""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1e999", "the number 1e999 is too large"),
        ("9" * 5000, "a number has too many digits"),
        ("!!int 1_0", "a whole number expected"),
        ("!!bool yes", "true or false expected"),
        ("!!int [1]", "a whole number expected"),
        ("!!seq {a: 1}", "a list expected"),
        ("!!map [1]", "keys and values expected"),
        ("!!timestamp 2020-01-01", "the tag !!timestamp is not allowed; write a plain or a"),
        ("!!python/name:os.system", "the tag !!python/name:os.system is not allowed"),
        ("&a [*a]", "found unconstructable recursive node"),
        ("{1: a, '1': b}", "key '1' is there twice"),
        ("{<<: {a: 1}, <<: {b: 1}}", "key '<<' is there twice"),
        ("{[1]: 2}", "a list or a mapping cannot be a key"),
        ("[" * 3000, "it is nested too deeply"),
        (ANCHORS, "its anchors expand to more than 1000000 values"),
        ("\x00", "unacceptable character"),
        ("run_dir: 'a\udcff'", "unacceptable character"),
        ('run_dir: "a\\0b"', "text cannot have the character U+0000"),
        ('{"\\uD800": 1}', "text cannot have the character U+D800"),
    ],
)
def test_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_yaml(text, "here")
    message = str(caught.value)
    assert message.startswith("here")
    assert problem in message
    assert "\n" not in message


def test_what_is_written_is_read_again_by_both_versions() -> None:
    text = {value: {"value": value, "list": [value]} for value in QUOTED}
    assert parse_yaml(dump_yaml(text), "") == text
    assert yaml.safe_load(dump_yaml(text)) == text
    numbers: dict[str, Any] = {"a": [1, -1e-5, 1e22, 0.1, None, True, {}], "b": math.inf, "c": []}
    assert parse_yaml(dump_yaml(numbers), "") == numbers == yaml.safe_load(dump_yaml(numbers))


@pytest.mark.parametrize("value", [*QUOTED, 1e-5, math.inf, {"a": [1, None, {}]}, True, 10**30])
def test_value_of_a_setting_is_one_line(value: object) -> None:
    text = in_one_line(value)
    assert len(text.splitlines()) == 1
    assert parse_yaml(text, "") == value


def test_run_file_keeps_its_text_and_numbers(tmp_path: Path) -> None:
    kwargs = {name: name for name in QUOTED}
    settings = [f"networks.student.model_kwargs={json.dumps(kwargs)}", "name=no", "seed=010"]
    config = load("digits-1t1s", [*settings, "description=1:30", "run_dir='1e3'"])
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(), encoding="utf-8")
    again = load(str(path))
    assert again == config
    assert (again.seed, again.name, again.run_dir) == (10, "no", "1e3")
    assert again.networks["student"].model_kwargs == kwargs
    assert yaml.safe_load(config.dump()) == config.model_dump(mode="json")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("seed=1:30", 'seed: found "1:30"; allowed: a whole number'),
        ("seed=1_000", 'seed: found "1_000"; allowed: a whole number'),
        ("seed=0b1", 'seed: found "0b1"; allowed: a whole number'),
        ("seed=~", "seed: found null; allowed: a whole number"),
        ("coordinator.timeout=1:30", 'coordinator.timeout: found "1:30"; allowed: a number'),
        ("coordinator.timeout=.inf", "coordinator.timeout: found Infinity; allowed: a finite"),
        ("compute.compile=no", 'compute.compile: found "no"; allowed: true or false'),
        ("data.flip=on", 'data.flip: found "on"; allowed: true or false'),
        ("run_dir=010", "run_dir: found 10; allowed: text (in quotes, where it looks like a numb"),
        ("placement={teacher: {00: 1}, student: [1]}", "with weights, got {'00': 1}"),
    ],
)
def test_message_says_what_is_allowed(setting: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        load("digits-1t1s", [setting])
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"), [("0.5", 0.5), ("010", 10.0), ("1_0", None), (".inf", None), ("on", None)]
)
def test_number_of_an_option(text: str, number: float | None) -> None:
    assert parse_number(text) == number
