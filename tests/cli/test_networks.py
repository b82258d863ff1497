"""`switokd networks`: the listed networks and images, as a table and as JSON.

Not covered: the numbers themselves (`tests/models/`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from switokd.cli import networks as networks_command
from switokd.cli.main import app
from switokd.models.paper import PAPER_NETWORKS

MODULE = """\
from torch import nn

def mine(num_classes, image_size, hidden=2, rate=0.5):
    layers = nn.Linear(3 * image_size**2, hidden), nn.Linear(hidden, num_classes)
    return nn.Sequential(nn.Flatten(), nn.Dropout(rate), *layers)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with a module of the user."""
    (tmp_path / "mynets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds the current folder
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    return tmp_path


def networks(*arguments: str) -> tuple[int, str]:
    """Run the command in this process; return exit code, and output with standard error."""
    env = {"COLUMNS": "80", "TERM": "dumb"}
    result = CliRunner().invoke(app, ["networks", *arguments], env=env)
    return result.exit_code, result.output


def rows(*arguments: str) -> Any:
    code, out = networks(*arguments, "--json")
    assert code == 0, out
    return json.loads(out)


def test_help_has_examples() -> None:
    code, out = networks("--help")
    assert code == 0
    for word in ("--classes", "--size", "--channels", "--json", "mynets:build --size 64", "timm:"):
        assert word in out


def test_networks_of_the_paper_are_listed_for_its_data() -> None:
    found = rows()
    assert [(r["network"], r["size"], r["classes"]) for r in found] == [
        (n.network, n.size, n.classes) for n in PAPER_NETWORKS
    ]
    assert {r["channels"] for r in found} == {3}
    (wide,) = (r for r in found if r["network"] == "wrn-16-10")
    assert wide == {
        "network": "wrn-16-10",
        "channels": 3,
        "size": 32,
        "classes": 100,
        "parameters": 17_174_324,
        "multiply_adds": 2_412_231_168,
        "paper": ["CIFAR-100 7T"],
    }


def test_table_fits_eighty_columns() -> None:
    code, out = networks()
    assert code == 0
    table, _, names = out.partition("names: ")
    assert max(len(line) for line in table.splitlines()) <= 80
    (line,) = (line for line in table.splitlines() if "resnet-34" in line)
    assert line.split() == [
        *("resnet-34", "3x64x64,", "200", "21,379,592", "4,637.7", "M", "Tiny-ImageNet", "4T")
    ]
    for family in ("wrn-DEPTH-WIDTH", "resnet-DEPTH", "mobilenetv2-WIDTH", "torchvision", "timm:"):
        assert family in names


def test_given_images_list_each_network_once(capsys: pytest.CaptureFixture[str]) -> None:
    networks_command.networks(size=28, classes=7, channels=1, as_json=True)
    out, err = capsys.readouterr()
    found = json.loads(out)
    fitting = [n.network for n in PAPER_NETWORKS if n.network not in ("resnet18", "resnet34")]
    assert [r["network"] for r in found] == list(dict.fromkeys(fitting))
    assert {(r["size"], r["classes"], r["channels"]) for r in found} == {(28, 7, 1)}
    (wrn,) = (r for r in found if r["network"] == "wrn-16-2")
    assert wrn["paper"] == ["CIFAR-100 4T 7T 7S", "Tiny-ImageNet 4T"]
    why = " does not take images of 1 x 28 x 28 "
    assert [line.partition(why)[0] for line in err.splitlines()] == [
        "switokd: left out: model resnet18",
        "switokd: left out: model resnet34",
    ]


def test_named_networks_and_a_users_network() -> None:
    found = rows("wrn-10-1", "mynets:mine", "wrn-16-2", "wrn-10-1")
    assert [(r["network"], r["size"], r["classes"]) for r in found] == [
        ("wrn-10-1", 32, 100),
        ("mynets:mine", 32, 100),
        ("wrn-16-2", 32, 100),
        ("wrn-16-2", 64, 200),
    ]
    assert found[1]["parameters"] == 3 * 32**2 * 2 + 2 + 2 * 100 + 100
    assert found[1]["multiply_adds"] == 3 * 32**2 * 2 + 2 * 100
    assert found[0]["paper"] == found[1]["paper"] == []


def test_arguments_of_named_networks() -> None:
    (found,) = rows("mynets:mine", "--size", "4", "--classes", "5", "--model-kwargs", "{hidden: 7}")
    assert found["multiply_adds"] == 48 * 7 + 7 * 5


def test_arguments_are_read_as_in_a_run_file() -> None:
    (found,) = rows(
        "mynets:mine", "--size", "4", "--classes", "5", "--model-kwargs", "{rate: 1e-1}"
    )
    assert found["classes"] == 5  # torch refuses a rate that is text


def test_table_of_networks_outside_the_paper() -> None:
    code, out = networks("wrn-10-1", "--size", "8")
    assert code == 0
    assert "paper" not in out
    assert "3x8x8" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["resnet19"], "switokd: no model 'resnet19'; did you mean 'resnet18'? (allowed: wrn-"),
        (
            ["resnet18", "--channels", "1"],
            "model resnet18 does not take images of 1 x 224 x 224",
        ),
        (["nowhere:net"], "switokd: model nowhere:net: there is no module 'nowhere'"),
        (
            ["mynets:mine", "--model-kwargs", "hidden"],
            "switokd: --model-kwargs: 'hidden' is no",
        ),
        (["mynets:mine", "--model-kwargs", "{"], "--model-kwargs: '{' is no YAML mapping"),
        (["mynets:mine", "--model-kwargs", "{colour: 1}"], "unexpected keyword argument 'colour'"),
        (["--model-kwargs", "{hidden: 3}"], "--model-kwargs needs a NAME"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], sentence: str) -> None:
    code, out = networks(*arguments)
    assert code == 2
    assert sentence in out
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize("option", ["--classes", "--size", "--channels"])
def test_numbers_are_positive(option: str) -> None:
    code, out = networks(option, "0")
    assert code == 2
    assert option in out
