"""Wheel, sdist, and the coordinator's distribution without PyTorch: built and installed by uv.

Builds and installations use new environments, as for a user, and need the package index.
Not covered: a release on an index; the container image.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import switokd
from tests.support import BIN, REPOSITORY, environment, process

pytestmark = pytest.mark.timeout(300)  # an index may be slow

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "switokd", "services", "deploy/coordinator")


def call(command: Sequence[str | Path], cwd: Path) -> str:
    """Run a command that must succeed; return its standard output."""
    done = subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def uv(*arguments: str | Path, cwd: Path) -> str:
    return call([BIN / "uv", *arguments], cwd)


def new_environment(folder: Path) -> Path:
    """Make a virtual environment without packages; return its bin folder."""
    uv("venv", "--quiet", "--python", sys.executable, folder, cwd=folder.parent)
    return folder / "bin"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that are built, so that the build leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        if (REPOSITORY / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
            shutil.copytree(REPOSITORY / name, target, ignore=ignored)
        else:
            shutil.copy(REPOSITORY / name, target)
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Path:
    """The wheel of the source tree."""
    uv("build", "--quiet", "--wheel", "--out-dir", "dist", cwd=sources)
    (path,) = (sources / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def coordinator_wheel(sources: Path) -> Path:
    """The wheel of switokd-coordinator."""
    uv(
        "build",
        "--quiet",
        "--wheel",
        "--out-dir",
        "dist-coordinator",
        "deploy/coordinator",
        cwd=sources,
    )
    (path,) = (sources / "dist-coordinator").glob("*.whl")
    return path


def contents(wheel: Path) -> dict[str, bytes]:
    """Name and content of every file in a wheel."""
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def modules(wheel: Path) -> dict[str, bytes]:
    """Name and content of every file in a wheel except its metadata."""
    return {name: text for name, text in contents(wheel).items() if ".dist-info/" not in name}


def dependencies(wheel: Path) -> set[str]:
    """Requirements of a wheel that belong to no extra."""
    (metadata,) = (text for name, text in contents(wheel).items() if name.endswith("/METADATA"))
    lines: list[str] = Parser().parsestr(metadata.decode()).get_all("Requires-Dist", [])
    return {line for line in lines if "extra ==" not in line}


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    names = contents(wheel).keys()
    metadata = f"switokd-{switokd.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"switokd", metadata}
    expected = {"switokd/py.typed"}
    for folder, package in (("switokd", "switokd"), ("services", "switokd/services")):
        for kind in ("*.py", "*.pyi", "*.yaml", "*.html", "*.js", "*.css", "*.svg"):
            for file in (REPOSITORY / folder).rglob(kind):
                expected.add(f"{package}/{file.relative_to(REPOSITORY / folder)}")
    assert {name for name in names if name.startswith("switokd/")} == expected


def test_the_sdist_builds_the_same_wheel(sources: Path, wheel: Path) -> None:
    uv("build", "--quiet", "--out-dir", "dist-from-sdist", cwd=sources)
    (sdist,) = (sources / "dist-from-sdist").glob("*.tar.gz")
    (rebuilt,) = (sources / "dist-from-sdist").glob("*.whl")
    assert sdist.name == f"switokd-{switokd.__version__}.tar.gz"
    assert contents(rebuilt) == contents(wheel)


def test_the_installed_wheel_runs_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    programs = new_environment(tmp_path / "venv")
    python = programs / "python"
    uv("pip", "install", "--quiet", "--no-deps", "--python", python, wheel, cwd=tmp_path)
    # The dependencies of the environment that runs the tests, without its editable switokd.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site_packages,) = (tmp_path / "venv/lib").glob("*/site-packages")
    (site_packages / "dependencies.pth").write_text("\n".join(packages), encoding="utf-8")
    where = call([python, "-c", "import switokd; print(switokd.__file__)"], tmp_path)
    assert where.strip() == str(site_packages / "switokd/__init__.py")
    assert "digits-2t1s" in call([programs / "switokd", "recipes"], tmp_path)
    version = f"switokd {switokd.__version__}"
    assert call([python, "-m", "switokd", "--version"], tmp_path).strip() == version
    assert "torchrun" in call([python, "-m", "switokd.train", "--help"], tmp_path)


def test_both_distributions_hold_the_same_modules(wheel: Path, coordinator_wheel: Path) -> None:
    assert modules(coordinator_wheel) == modules(wheel)
    assert dependencies(coordinator_wheel) < dependencies(wheel)


def test_the_coordinator_runs_where_there_is_no_torch(
    coordinator_wheel: Path, tmp_path: Path
) -> None:
    programs = new_environment(tmp_path / "venv")
    uv(
        "pip",
        "install",
        "--quiet",
        "--python",
        programs / "python",
        coordinator_wheel,
        cwd=tmp_path,
    )
    listing = uv("pip", "list", "--format", "json", "--python", programs / "python", cwd=tmp_path)
    installed = {package["name"] for package in json.loads(listing)}
    assert "switokd-coordinator" in installed
    assert installed.isdisjoint({"switokd", "torch", "torchvision", "numpy", "matplotlib"})
    command = [str(programs / "switokd"), "coordinator", "--port=0", "--http-port=0"]
    with process(command, tmp_path) as child:
        assert child.stdout is not None
        ready = json.loads(child.stdout.readline())
        with grpc.insecure_channel(ready["grpc"]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with urllib.request.urlopen(f"http://{ready['http']}/healthz", timeout=30) as response:
            assert response.status == 200
        child.terminate()
        assert child.wait(30) == 0
