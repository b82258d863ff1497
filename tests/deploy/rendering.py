"""What tests of rendered manifests share: rendering in this process, validation by models.

Not covered: the objects themselves (`tests/deploying/test_render.py`).
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from typing import Any

import typer
import yaml

from switokd.cli.main import app

Manifest = dict[str, Any]


def command(*arguments: str) -> tuple[int, str, str]:
    """Run `switokd k8s render ARGUMENTS` in this process: exit code, output, errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            typer.main.get_command(app).main(args=["k8s", "render", *arguments])
            code: Any = 0
        except SystemExit as error:
            code = error.code or 0
    return int(code), out.getvalue(), err.getvalue()


def rendered(*arguments: str) -> list[Manifest]:
    """The objects of a run; without `--memory` an estimate would import PyTorch."""
    code, out, err = command(*arguments, "--image=switokd:1", "--memory=2Gi")
    assert code == 0, err
    return list(yaml.safe_load_all(out))


def of_kind(objects: list[Manifest], kind: str) -> Manifest:
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


def validation_errors(manifests: str) -> list[str]:
    """Output of the validator except "passed"; an unknown kind is only a warning there."""
    words = [sys.executable, "-m", "kubernetes_validate", "--strict", "-"]
    done = subprocess.run(words, input=manifests, capture_output=True, text=True, timeout=120)
    output = (done.stdout + done.stderr).splitlines()
    return [line for line in output if " passed for resource " not in line]
