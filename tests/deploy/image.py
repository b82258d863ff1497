"""Reads deploy/Containerfile as a builder does, and runs its steps without a container.

No base image can be had without a registry. A step therefore runs in this machine's system, with
the folders of the image in a folder of the test.

Not covered: steps that change the system (groups, users, Debian packages).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import REPOSITORY, environment

CONTAINERFILE = REPOSITORY / "deploy/Containerfile"


@dataclass
class Stage:
    """A stage of the build. parent: the stage or image that it begins with."""

    name: str
    parent: str
    steps: list[tuple[str, str]] = field(default_factory=list)
    """Instruction and argument, without comments, each in one line."""

    def last(self, instruction: str) -> str:
        """Return the argument of the last such instruction; empty if there is none."""
        return next((text for word, text in reversed(self.steps) if word == instruction), "")


def stages() -> dict[str, Stage]:
    """Return the stages by name."""
    text = re.sub(r"^\s*#.*\n", "", CONTAINERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            found[name] = Stage(name, parent)
        elif word:
            found[name].steps.append((word, rest.strip()))
    return found


def command(stage: Stage) -> list[str]:
    """Return the words of a stage's CMD."""
    words: list[str] = json.loads(stage.last("CMD"))
    return words


def health_check(stage: Stage) -> list[str]:
    """Return the words of a stage's health check."""
    words: list[str] = json.loads(stage.last("HEALTHCHECK").partition(" CMD ")[2])
    return words


def context(folder: Path) -> None:
    """Copy what .dockerignore lets through into a folder, as a builder sends it."""
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for pattern in (line[1:] for line in lines if line.startswith("!")):
        for source in REPOSITORY.glob(pattern):
            target = folder / source.relative_to(REPOSITORY)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)


def build(stage: Stage, root: Path) -> Path:
    """Run a stage's COPY and RUN steps with root/opt and root/src; return root/opt/switokd."""
    sent, here = root / "context", root / "src"
    context(sent)
    here.mkdir(parents=True)
    for word, text in stage.steps:
        if word == "COPY":
            source, target = (Path(name) for name in text.split())
            if str(source) == ".":
                shutil.copytree(sent, here, dirs_exist_ok=True)
            else:
                shutil.copy(sent / source, here / target)
        elif word == "RUN":
            for command in text.replace("/opt/", f"{root}/opt/").split(" && "):
                _call(shlex.split(command), here, root / "opt/switokd/bin")
    return root / "opt/switokd"


def _call(words: list[str], cwd: Path, programs: Path) -> None:
    """Run a program of the environment, or Python of this machine to make the environment."""
    words[0] = str(programs / words[0]) if programs.exists() else sys.executable
    done = subprocess.run(
        words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
