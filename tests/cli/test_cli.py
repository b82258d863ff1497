"""The command line: help, recipes, exit codes, and packages that are not imported.

Not covered: training itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from switokd import __version__
from switokd.cli.main import app
from switokd.config.recipes import recipes
from switokd.config.run_file import load
from switokd.config.sections import PairSettings
from tests.support import REPOSITORY, run


def invoke(*arguments: str) -> tuple[int, str]:
    """Run the command in this process; return exit code and output."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["train", "coordinator", "recipes", "Exit codes: 0 success, 2 a mistake"]),
        (["train", "--help"], ["RECIPE_OR_FILE", "KEY.KEY=VALUE", "torchrun --nproc-per-node=N"]),
        (["coordinator", "--help"], ["--host", "--port", "--http-port", "9464", "50051"]),
        (["recipes", "--help"], ["run files that ship with switokd"]),
    ],
)
def test_help(arguments: list[str], words: list[str]) -> None:
    code, out = invoke(*arguments)
    assert code == 0
    for word in words:
        assert word in " ".join(out.split())


def test_version() -> None:
    assert invoke("--version") == (0, f"switokd {__version__}\n")


def test_recipes_are_listed_one_per_line() -> None:
    code, out = invoke("recipes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == recipes()
    (line,) = (line for line in out.splitlines() if line.startswith("digits-2t1s "))
    assert line.split()[1] == "2T1S"
    assert load("digits-2t1s").description in line


@pytest.mark.parametrize("recipe", recipes())
def test_printed_recipe_is_a_run_file(recipe: str, tmp_path: Path) -> None:
    code, out = invoke("recipes", recipe)
    assert code == 0
    assert yaml.safe_load(out)["name"] == recipe
    (tmp_path / "mine.yaml").write_text(out)
    assert load(str(tmp_path / "mine.yaml")) == load(recipe)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nope"], "switokd: nope: no such run file, and no recipe of that name"),
        (["train", "digits-2t1s", "schedule.epohs=3"], "did you mean schedule.epochs?"),
        (["recipes", "digits-2t1z"], "did you mean 'digits-2t1s'?"),
    ],
)
def test_mistake_gives_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    code, out, err = run([sys.executable, "-m", "switokd", *arguments], tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("switokd: ")
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_worker_reports_a_mistake_in_the_same_way(tmp_path: Path) -> None:
    code, out, err = run([sys.executable, "-m", "switokd.train", "nope"], tmp_path)
    assert (code, out) == (2, "")
    assert "nope: no such run file" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("switokd.cli.main", ["torch", "numpy", "pydantic", "yaml", "asyncio"]),
        ("switokd.cli.plan_report", ["torch", "numpy"]),
        ("switokd.cli.compare_runs", ["torch"]),
        ("switokd.cli.worker", ["torch", "numpy"]),
        ("switokd.cli.finding", ["torch", "numpy", "pydantic", "yaml"]),
        ("switokd.cli.run_tables", ["torch", "numpy", "pydantic", "yaml"]),
        ("switokd.services.coordinator.server", ["torch", "torchvision"]),
    ],
)
def test_modules_do_not_import_heavy_packages(module: str, forbidden: list[str]) -> None:
    program = f"import sys, {module}; print(sorted(set({forbidden}) & set(sys.modules)))"
    code, out, err = run([sys.executable, "-c", program], REPOSITORY)
    assert (code, out.strip()) == (0, "[]"), err


@pytest.mark.parametrize(
    "command", [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]
)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    code, out = invoke(command, "--help")
    assert code == 0
    example = "switokd train" if command == "settings" else f"switokd {command}"
    assert example in out


def test_settings_lists_every_setting() -> None:
    code, output = invoke("settings")
    assert code == 0
    listed = {line.split()[0] for line in output.splitlines() if line and line[0] != "#"}
    config = load("digits-1t1s").model_dump(mode="json")
    config["networks"] = {"NAME": config["networks"]["student"]}
    config["pairs"] = {"TEACHER": {"STUDENT": PairSettings().model_dump()}}

    def keys(tree: dict[str, Any], prefix: str = "") -> set[str]:
        result: set[str] = set()
        for key, value in tree.items():
            is_section = isinstance(value, dict) and not key.endswith("kwargs")
            result |= keys(value, f"{prefix}{key}.") if is_section else {prefix + key}
        return result

    assert listed - {"networks.NAME.optimizer.betas"} == keys(config)


def test_a_command_without_its_dependencies_says_what_to_install(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["torch"] = None  # as where only switokd-coordinator is installed
from switokd.cli.main import main
sys.argv = ["switokd", "train", "digits-1t1s", "placement=replicated", "coordinator=off"]
main()
"""
    code, out, err = run([sys.executable, "-c", program], tmp_path)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("switokd: this command needs torch, which switokd-coordinator leaves")
