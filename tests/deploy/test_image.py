"""The images: their file is clean, locked and non-root; the coordinator's is built and run.

Its build steps run in this machine's system (`image.py`).
Not covered: the base image itself; the worker's packages, which take several GB.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.deploy.image import CONTAINERFILE, build, command, health_check, stages
from tests.support import BIN, REPOSITORY, process, run, wait_until

REQUIREMENTS = REPOSITORY / "deploy/requirements"
BASE_MEGABYTES = 130
"""python:3.11-slim-bookworm unpacked is a little less: 48 MB compressed."""


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([BIN / "hadolint", CONTAINERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_two_targets_from_one_base_by_digest() -> None:
    found = stages()
    images = [stage.parent for stage in found.values() if stage.parent not in found]
    assert len(images) == 1
    assert re.search(r":3\.11-slim-bookworm@sha256:[0-9a-f]{64}$", images[0])
    assert [*found][-1] == "worker"  # what a build without --target makes
    for name in ("coordinator", "worker"):
        assert found[name].last("USER") == "10001:10001"
        assert found[name].last("COPY") == f"--from={name}-packages /opt/switokd /opt/switokd"
        assert command(found[name])[0] == "switokd"
    assert "torch" not in found["coordinator"].last("RUN")


@pytest.mark.parametrize("name", ["coordinator", "worker"])
def test_dependencies_are_locked_and_come_before_the_sources(name: str) -> None:
    steps = [text for word, text in stages()[f"{name}-packages"].steps if word in ("COPY", "RUN")]
    _, lock, dependencies, sources, package = steps
    assert lock == f"deploy/requirements/{name}.txt requirements.txt"
    assert "--require-hashes" in dependencies
    assert sources == ". ."
    assert {"--no-deps", "--no-build-isolation"} <= {*package.split()}


@pytest.mark.parametrize(
    ("name", "project"),
    [("coordinator", "deploy/coordinator/pyproject.toml"), ("worker", "pyproject.toml")],
)
def test_the_lock_has_every_dependency_with_hashes(name: str, project: str) -> None:
    lock = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.findall(
        r"^([\w.-]+)==\S+.*\\\n((?: +--hash=sha256:[0-9a-f]{64}.*\n)+)", lock, re.M
    )
    assert len(entries) == len(re.findall(r"^\w", lock, re.M))
    text = (REPOSITORY / project).read_text(encoding="utf-8")
    (wanted,) = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)
    names = {found.lower() for found in re.findall(r'^ *"([\w.-]+)', wanted, re.M)}
    assert names <= {entry.lower() for entry, _ in entries}, "run make lock"
    assert ("torch" in {entry for entry, _ in entries}) is (name == "worker")


@pytest.mark.timeout(300)  # an index may be slow
def test_the_coordinators_image_is_small_and_runs(tmp_path: Path) -> None:
    """Its commands run as they stand, but on free ports."""
    found = stages()
    installed = build(found["coordinator-packages"], tmp_path)
    size = sum(file.lstat().st_size for file in installed.rglob("*") if file.is_file()) / 1e6
    assert not list(installed.glob("lib/*/site-packages/torch"))
    assert size + BASE_MEGABYTES < 200, size

    def program(words: list[str]) -> list[str]:
        return [str(installed / "bin" / words[0]), *words[1:]]

    ports_and_access = ("--port=0", "--http-port=0", "--allow-plaintext")
    start = [*program(command(found["coordinator"])), *ports_and_access]
    healthy = health_check(found["coordinator"])
    with process(start, tmp_path, tmp_path / "log") as coordinator:

        def ports() -> dict[str, str] | None:
            lines = (tmp_path / "log").read_text().splitlines()
            return next((json.loads(line) for line in lines if line.startswith("{")), None)

        port = wait_until(ports, 30, "the coordinator's addresses")["http"].rpartition(":")[2]
        check = [word.replace("9464", port) for word in program(healthy)]
        assert run(check, tmp_path) == (0, "", "")
        coordinator.terminate()
        assert coordinator.wait(20) == 0
    assert run(check, tmp_path)[0] != 0  # it is no longer there


@pytest.mark.timeout(60)
def test_the_worker_is_not_checked_while_it_trains() -> None:
    assert stages()["worker"].last("HEALTHCHECK") == "NONE"
