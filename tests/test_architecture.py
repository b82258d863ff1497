"""The structure of the code: import directions, modules without torch, sizes.

Not covered: modules that are imported by a computed name (importlib).
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import BIN, REPOSITORY, environment

MODULE_LINES, CLASS_LINES, FUNCTION_LINES, PARAMETERS = 400, 200, 60, 8

EXCEPTIONS: dict[str, str] = {}
"""Place (as `oversized` names it) -> reason why the limit does not hold there."""

TORCH_FREE = [
    "switokd.config.config",
    "switokd.config.run_file",
    "switokd.config.recipes",
    "switokd.config.explain",
    "switokd.config.templates",
    "switokd.distillation.decision",
    "switokd.services.coordinator.server",
    "switokd.coordination.operator_client",
    "switokd.runs.folder_status",
    "switokd.runs.run_dir",
    "switokd.runs.compare.table",
    "switokd.runs.compare.statistics",
    "switokd.runs.replay.picture",
    "switokd.runs.report.files",
    "switokd.deploying.render",
    "switokd.export.manifest",
]
ROOMS = [
    ".".join(file.parent.relative_to(REPOSITORY).parts)
    for file in sorted((REPOSITORY / "switokd").rglob("__init__.py"))
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources with services/ at its import path, switokd/services."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "switokd", tmp_path / "switokd", ignore=ignored)
    shutil.copytree(REPOSITORY / "services", tmp_path / "switokd/services", ignore=ignored)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(tree: Path) -> tuple[int, str]:
    """Exit code and output of import-linter on a copy of the sources."""
    if not (BIN / "lint-imports").exists() and sys.version_info[:2] == (3, 10):
        pytest.skip("import-linter needs Python 3.11")
    done = subprocess.run(
        [BIN / "lint-imports", "--no-cache", "--no-logo"],
        cwd=tree,
        env=environment(PYTHONPATH="."),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def test_no_room_imports_a_room_above_it(tree: Path) -> None:
    code, output = lint_imports(tree)
    assert code == 0, output
    assert "2 kept, 0 broken" in output


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        (
            "data/loader.py",
            "import switokd.worker",
            "switokd.data is not allowed to import switokd.worker",
        ),
        (
            "distillation/gap.py",
            "def late():\n    from switokd.training import step",
            "switokd.distillation is not allowed to import switokd.training",
        ),
        (
            "services/coordinator/plan.py",
            "from switokd.config.config import Config",
            "switokd.services is not allowed to import switokd.config",
        ),
        ("attic.py", "", "switokd.attic"),
        (
            "distillation/gap.py",
            "import switokd.distillation.decision",
            "No modules of a room import each other in a circle BROKEN",
        ),
    ],
    ids=["upward", "inside a function", "service", "module without a layer", "circle"],
)
def test_a_forbidden_import_is_reported(tree: Path, module: str, line: str, message: str) -> None:
    with (tree / "switokd" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    code, output = lint_imports(tree)
    assert code == 1
    assert message in " ".join(output.split())


def heavy_imports(*statements: str) -> dict[str, str]:
    """Run statements in a new process; return those that leave a heavy library imported."""
    command = f"""
import sys
heavy = {{"torch", "torchvision", "matplotlib"}}
for statement in {statements!r}:
    exec(statement)
    print("imported", statement.splitlines()[0], *sorted(heavy & sys.modules.keys()), sep="|")
"""
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    reports = [line.split("|") for line in done.stdout.splitlines() if line.startswith("imported|")]
    assert len(reports) == len(statements)
    return {statement: " ".join(names) for _, statement, *names in reports if names}


def test_modules_that_need_no_torch_do_not_import_it() -> None:
    assert heavy_imports(*(f"import {module}" for module in TORCH_FREE)) == {}


def test_a_room_imports_nothing_heavy_by_itself() -> None:
    assert heavy_imports(*(f"import {room}" for room in ROOMS)) == {}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["recipes"], ["coordinator", "--help"], ["replay", "--help"]]
)
def test_commands_that_do_not_train_import_no_torch(arguments: list[str]) -> None:
    command = f"""
from switokd.cli.main import main
sys.argv = {["switokd", *arguments]}
try:
    main()
except SystemExit as end:
    assert not end.code
"""
    assert heavy_imports(command.strip()) == {}


def test_an_import_of_torch_is_noticed() -> None:
    statement = "import switokd.training.learner"
    assert heavy_imports("import switokd.errors", statement) == {statement: "torch"}


def sources(*folders: str) -> list[Path]:
    """Python files of these folders of the repository, without generated code."""
    files = [file for folder in folders for file in sorted((REPOSITORY / folder).rglob("*.py"))]
    return [file for file in files if file.parent != REPOSITORY / "switokd/v1"]


def oversized(file: Path, text: str) -> Iterator[tuple[str, str]]:
    """Place (`path` or `path:name`) and size of everything above its limit."""
    place = str(file.relative_to(REPOSITORY))
    if (count := len(text.splitlines())) > MODULE_LINES:
        yield place, f"{count} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            count = node.end_lineno - node.lineno + 1
            if count > (CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES):
                yield f"{place}:{node.name}", f"{count} lines"
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    count = len(method.args.args) + len(method.args.kwonlyargs) - 1
                    if count > PARAMETERS:
                        yield f"{place}:{node.name}.__init__", f"{count} parameters"


def test_modules_classes_and_functions_are_small() -> None:
    files = sources("switokd", "services", "bench", "tests")
    places = dict(
        place for file in files for place in oversized(file, file.read_text(encoding="utf-8"))
    )
    assert {place: size for place, size in places.items() if place not in EXCEPTIONS} == {}
    assert EXCEPTIONS.keys() <= places.keys(), "an exception is no longer needed"


def test_an_oversized_module_class_or_function_is_reported() -> None:
    constructor = f"    def __init__(self, {', '.join(f'a{i}' for i in range(PARAMETERS + 1))}):"
    text = "class Large:\n" + constructor + "\n        pass\n" * (MODULE_LINES + 1)
    places = {place for place, _ in oversized(REPOSITORY / "a.py", text)}
    assert places == {"a.py", "a.py:Large", "a.py:__init__", "a.py:Large.__init__"}


def test_private_names_stay_in_their_module() -> None:
    private = {
        f"{file.relative_to(REPOSITORY)}: {alias.name} of {node.module}"
        for file in sources("switokd", "services", "bench")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    }
    assert not private


def classes_of(file: Path) -> list[str]:
    """Names of the classes that a file defines, inner and private ones too."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def test_each_name_of_a_class_is_used_once() -> None:
    places: dict[str, list[str]] = {}
    for file in sources("switokd", "services"):
        for name in classes_of(file):
            places.setdefault(name, []).append(str(file.relative_to(REPOSITORY)))
    assert len(places) > 100
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
